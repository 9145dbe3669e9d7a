"""What chat templates write around a question and its answer, and whether a conversation came through whole."""

import json
import re
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from allo_fast.config import UserError
from allo_fast.data.conversations import THOUGHTS, Messages
from allo_fast.data.sources import UnusableRow

_QUESTION, _ANSWER = "7kvestion7", "7risponse7"  # words that no template writes


class Frame:
    """What a chat template writes around a question and its answer, found by rendering one.

    render: conversations with the template, `opened` for an answer or not. Raises UserError where it does not render.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, render: Callable[..., str]):
        question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        try:
            asked, opened, whole = render([question]), render([question], opened=True), render([question, answer])
        except UnusableRow as error:
            raise UserError(f"{tokenizer.name_or_path}: a question and its answer: {error}") from None
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        closing = tokenizer(whole.rpartition(_ANSWER)[2], add_special_tokens=False).input_ids
        bos = tokenizer.bos_token
        self.added = added.keys()
        asked_whole = whole.partition(_ANSWER)[0]
        self.bos = bos if bos and asked_whole.count(bos) <= 1 else None  # else it opens every turn
        self.turn = asked_whole.partition(_QUESTION)[2].partition("<think>")[0].strip()  # where the assistant's begins
        special = [token for token in closing if token in added and tokenizer.added_tokens_decoder[token].special]
        ends = special or [token for token in closing if token in added]
        self.closes = bool(ends)
        self.end_token = ends[0] if ends else tokenizer.eos_token_id
        self.end_text = tokenizer.convert_ids_to_tokens(self.end_token)
        self.opening = opened.removeprefix(asked) if opened.startswith(asked) else ""
        head, _, self.tail = opened.rpartition(_QUESTION)
        self.has_bos = bool(self.bos) and opened.startswith(self.bos)
        self.gap = asked_whole.removeprefix(opened) if asked_whole.startswith(opened) else ""
        self.head = head.removeprefix(self.bos or "\0").strip()
        others = {self.bos, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
        self.marks = [text for text in added.values() if text in opened and text not in others]

    def contains(self, text: str) -> bool:
        """Is this text already in the chat format? It begins as the template does, and ends so or in a begun answer."""
        inner = text.removeprefix(self.bos or "\0").strip()
        begins = inner.startswith((*self.marks, *[self.head] * bool(self.head)))
        ends = inner.endswith((*self.marks, self.end_text, *[self.tail.strip()] * bool(self.tail.strip())))
        return begins and (ends or bool(self.opening.strip()) and self.opening.strip() in inner)

    def turn_within(self, message: dict) -> str:
        """Of a message that holds a turn of the assistant's, and more of the format: from there on; else nothing."""
        before, turn, behind = message["content"].partition(self.turn or "\0")
        others = (*self.marks, self.end_text, *[self.head] * bool(self.head))
        return turn + behind if turn and any(mark in message["content"] for mark in others) else ""

    def completed(self, text: str) -> str:
        """A text in the chat format with what it lacks of BOS and of the assistant's header."""
        bos = self.bos if self.has_bos and not text.startswith(self.bos) else ""
        cut = next((cut for cut in range(len(self.tail), 0, -1) if text.endswith(self.tail[:cut])), len(self.tail))
        return bos + text + self.tail[cut:]

    def closed(self, response: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """A response up to the token that ends the turn, which is added where the template ends turns with none.

        Some turns, as calls, end with another token than an answer: the last one that only white space follows.
        """
        if not self.closes:
            return [*response, self.end_token]
        if self.end_token in response:
            return response[: response.index(self.end_token) + 1]
        end = len(response)
        while end and not tokenizer.decode([response[end - 1]]).strip():
            end -= 1
        if not end or response[end - 1] not in self.added:
            raise UnusableRow(f"the chat template does not end the response: ...{tokenizer.decode(response[-20:])!r}")
        return response[:end]


def check_complete(text: str, added: str, messages: Messages, turn: dict, tools: list[dict] | None) -> None:
    """Raises UnusableRow for a part of the conversation that the template left out; added: what the response added.

    What earlier turns of the assistant thought may be: templates drop it on purpose.
    """
    parts = [(f"the {m['role']}'s message", m["content"], text) for m in messages if m["role"] != "assistant"]
    if turn["content"].strip() not in text:
        pieces = [piece for piece in re.split(r"</?think>", turn["content"]) if piece.strip()]
        parts += [("the response's thoughts", piece, text) for piece in pieces[:-1]]
        parts += [("the response", piece, text) for piece in pieces[-1:]]
    parts += [(f"the response's {key}", turn[key], text) for key in THOUGHTS if isinstance(turn.get(key), str)]
    parts += [("a call", part, text) for message in messages for part in _call_parts(message)]
    parts += [("a call", part, added) for part in _call_parts(turn)]
    described = [tool.get("function", tool) for tool in tools or []]
    parts += [("a tool", tool["name"], text) for tool in described if isinstance(tool.get("name"), str)]
    for name, part, where in parts:
        if part.strip() not in where and json.dumps(part.strip(), ensure_ascii=False)[1:-1] not in where:
            raise UnusableRow(f"the chat template leaves out {name}: {part.strip()[:80]!r}")


def _call_parts(message: dict) -> list[str]:
    """Of a message's tool calls the names, and the arguments' values."""
    parts = []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        values = arguments.values() if isinstance(arguments, dict) else [arguments]
        parts += [str(function.get("name", "")), *(v if isinstance(v, str) else json.dumps(v) for v in values)]
    return parts
