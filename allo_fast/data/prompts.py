"""From conversations to token ids: the whole conversation as the chat template renders it, cut at the response.

    prompt_ids + response_ids = the template's own tokens, up to the one that ends the assistant's turn

Tokenizers without a chat template get texts: prompt and response as one, then the end of sequence.
"""

import json
import re
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase

from allo_fast.config import UserError
from allo_fast.data.conversations import THOUGHTS, Messages
from allo_fast.data.preferences import Turn
from allo_fast.data.sources import UnusableRow
from allo_fast.data.templates import Frame, check_complete

_ENDS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")  # that dumps of texts have
INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response: Let's think step by step."
)
REWRITE = (
    "Given the problem and the correct solution, you need to correct the mistakes in the prediction to get the correct "
    "answer. You should write down the correct prediction and use 'The answer is: ' (without quotation mark) to "
    "identify the final answer. You should make minimal modifications. You should not copy the problem.\n\n"
    "### Problem:\n{}\n\n### Correct solution:\n{}\n\n### Prediction:\n{}\n\n### Correct prediction:\n"
)


class Prompts:
    """Encodes prompts and responses; the same prompt is used to sample, to train and to evaluate.

    chat: True needs a chat template, False never uses it, None uses it where there is one. template: "{}" is a prompt
    that is a text; None: the paper's instruction, or the text alone inside a chat template. template_kwargs: arguments
    of the chat template, as `enable_thinking`. Raises UserError for a tokenizer without end-of-sequence token, without
    the chat template it needs, or whose template does not render a question and its answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool | None = None,
        template: str | None = None,
        rewrite: str | None = None,
        template_kwargs: dict | None = None,
    ):
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token")
        if chat and not tokenizer.chat_template:
            raise UserError(f"{tokenizer.name_or_path}: data.chat_template is true, but the tokenizer has none")
        for name, text, holes in (("data.prompt_template", template, 1), ("rewards.template", rewrite, 3)):
            if text is not None and text.count("{}") != holes:
                raise UserError(f"{name}: expected {holes} times {{}}, got {text!r}")
        self.tokenizer, self.template_kwargs = tokenizer, template_kwargs or {}
        self.chat = bool(tokenizer.chat_template) and chat is not False
        self.template = template or ("{}" if self.chat else INSTRUCTION)
        self.rewrite = rewrite or REWRITE
        self.frame = Frame(tokenizer, self.render) if self.chat else None
        self.end_token = self.frame.end_token if self.chat else tokenizer.eos_token_id
        self.end_tokens = {self.end_token, tokenizer.eos_token_id}
        own = {*map(tokenizer.convert_ids_to_tokens, self.end_tokens)}
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._other_ends = tuple(special.intersection(_ENDS) - own)
        ends, others = ("|".join(map(re.escape, sorted(names))) for names in (own, self._other_ends))
        self._ending = re.compile(rf"(\s*({ends}))+(\s*({others}))*\s*\Z" if others else rf"(\s*({ends}))+\s*\Z")

    def encode_prompt(self, prompt: str | Messages, tools: list[dict] | None = None, suffix: str = "") -> list[int]:
        """Token ids of a prompt and a suffix, ready for a response to follow. Raises UnusableRow."""
        return self._tokens(self._prompt_text(prompt, tools) + suffix)

    def encode_rewrite(self, problem: str | Messages, solution: str, response: str) -> list[int]:
        """Token ids of the rewriting prompt (T4 of the paper's token rewards)."""
        parts = iter((as_text(problem), solution, response))
        text = "".join(piece + next(parts, "") for piece in self.rewrite.split("{}"))
        return self._tokens(self.render([_user(text)], opened=True) if self.chat else text)

    def encode_response(self, response: Turn, prompt: str | Messages = "question") -> list[int]:
        """Token ids of a response after a prompt, with what ends it. Raises UnusableRow."""
        return self.encode(prompt, [response])[1][0]

    def encode(
        self, prompt: str | Messages, responses: list[Turn], tools: list[dict] | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt and of each response after it, with what ends it.

        Raises UnusableRow where the tokens of prompt and response are not those of the conversation as a whole, where
        the template leaves a part of it out, and where the template or the tokenizer refuses it.
        """
        before = self._prompt_text(prompt, tools)
        prompt_ids = self._tokens(before)
        return prompt_ids, [self._after(before, prompt_ids, self._whole(prompt, turn, tools)) for turn in responses]

    def encode_whole(self, prompt: str | Messages, response: str, tools: list[dict] | None = None) -> list[int]:
        """Token ids of the conversation as it is rendered, whatever comes behind the response. Raises UnusableRow."""
        end = self.tokenizer.convert_ids_to_tokens(self.end_token)
        ids = self._tokens(self._whole(prompt, response.partition(end)[0], tools))
        return ids if self.chat else [*ids, self.end_token]

    def request(self, prompt: str | Messages, tools: list[dict] | None = None, suffix: str = "") -> dict:
        """As a server of OpenAI's API is asked for what follows: {messages}, with tools and the template's arguments;
        or {prompt}, a text without what the tokenizer adds to it. Raises UnusableRow."""
        messages = self._messages(prompt) if self.chat else None
        if messages and messages[-1]["role"] != "assistant":
            more = {"tools": tools, "chat_template_kwargs": self.template_kwargs}
            return {"messages": messages, **{name: value for name, value in more.items() if value}}
        return {"prompt": self._prompt_text(prompt, tools).removeprefix(self._added_bos()) + suffix}

    def render(self, messages: Messages, tools: list[dict] | None = None, opened: bool = False, **settings) -> str:
        """The conversation as the chat template writes it; opened: ready for the assistant. Raises UnusableRow."""
        settings = {**self.template_kwargs, "tokenize": False, "add_generation_prompt": opened, **settings}
        try:
            text = self.tokenizer.apply_chat_template(messages, tools=tools, **settings)
            left_out = tools and text == self.tokenizer.apply_chat_template(messages, **settings)
        except Exception as error:  # a template is code of the model's author: it may raise anything
            raise UnusableRow(f"the chat template refuses it: {error}") from error
        if left_out:
            raise UnusableRow(f"the chat template leaves out the tools: {json.dumps(tools, ensure_ascii=False)[:80]}")
        return text

    def _prompt_text(self, prompt: str | Messages, tools: list[dict] | None) -> str:
        if not self.chat:
            return self.template.replace("{}", self._plain(prompt, tools), 1)
        messages = self._messages(prompt)
        if messages is None:
            if tools:
                raise UnusableRow("tools do not go with a prompt that is already in the chat format")
            return self.frame.completed(prompt)
        if messages[-1]["role"] == "assistant":
            return self.render(messages, tools, continue_final_message=True)
        return self.render(messages, tools, opened=True)

    def _whole(self, prompt: str | Messages, turn: Turn, tools: list[dict] | None) -> str:
        """Prompt and response as one text."""
        if isinstance(turn, str):
            turn = self._response_text(turn)
        elif not self.chat:
            raise UnusableRow("a response with more than text needs a tokenizer with a chat template")
        messages = self._messages(prompt) if self.chat else None
        if messages is None:
            if not isinstance(turn, str):
                raise UnusableRow("a response with more than text does not go with a prompt that is a text")
            before = self._prompt_text(prompt, tools)
            if lacking := before.partition(prompt)[2] if self.chat else "":
                turn = turn.removeprefix(lacking)  # a conversation that was cut before it
            gap = self.frame.gap if self.chat else " " * before.endswith("\n\nAssistant:")
            end = self.frame.end_text if self.chat and self.frame.closes else ""
            return before + gap * (not turn[:1].isspace()) + turn + end
        turn = (
            {"role": "assistant", "content": turn.removeprefix(self.frame.opening)} if isinstance(turn, str) else turn
        )
        if messages[-1]["role"] == "assistant":
            *messages, begun = messages
            turn = {**begun, **turn, "content": begun["content"] + turn["content"]}
        text = self.render([*messages, turn], tools)
        for key, thought in ((key, turn[key]) for key in THOUGHTS if turn.get(key, "").strip()):
            without = {
                k: v for k, v in turn.items() if k not in THOUGHTS or v != thought
            }  # one may stand under two keys
            if self.render([*messages, without], tools) == text:
                raise UnusableRow(f"the chat template leaves out the response's {key}: {thought[:80]!r}")
        before = len(self.render(messages, tools)) if turn.get("tool_calls") else 0
        check_complete(text, text[before:], messages, turn, tools)
        return text

    def _after(self, before: str, prompt_ids: list[int], text: str) -> list[int]:
        """The response's part of the tokens of `text`, up to what ends the turn."""
        ids = self._tokens(text)
        if not text.startswith(before):
            at = max(0, len(commonprefix([before, text])) - 40)
            raise UnusableRow(
                f"the chat template writes the prompt otherwise when a response follows: "
                f"...{before[at : at + 120]!r} alone, ...{text[at : at + 120]!r} with it"
            )
        if ids[: len(prompt_ids)] != prompt_ids:
            at = len(commonprefix([prompt_ids, ids]))
            names = [self.tokenizer.convert_ids_to_tokens(part[max(0, at - 2) : at + 3]) for part in (prompt_ids, ids)]
            raise UnusableRow(f"prompt and response meet within a token: {names[0]} alone, {names[1]} together")
        response = ids[len(prompt_ids) :]
        return self.frame.closed(response, self.tokenizer) if self.chat else [*response, self.end_token]

    def _tokens(self, text: str) -> list[int]:
        """One BOS where there is one, and no end of sequence behind."""
        try:
            ids = self.tokenizer(text, add_special_tokens=not self.chat).input_ids
        except Exception as error:
            raise UnusableRow(f"the tokenizer refuses it: {error}") from error
        if not self.chat:
            while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]
        if not ids:
            raise UnusableRow("the prompt has no token")
        return ids

    def _messages(self, prompt: str | Messages) -> Messages | None:
        """The prompt as messages; None for a text that is already in the chat format."""
        if isinstance(prompt, str):
            if self.frame and self.frame.contains(prompt):
                return None
            prompt = [_user(self.template.replace("{}", prompt, 1))]
        elif any(self.frame.contains(message["content"]) for message in prompt):
            raise UnusableRow("a message is already in the chat format, and would be wrapped again")
        if within := next(filter(None, map(self.frame.turn_within, prompt)), None):
            raise UnusableRow(f"a message holds turns of the chat format: ...{within[:80]!r}")
        bos = self.frame.bos or "\0"
        return [{**message, "content": self._trimmed(message["content"]).removeprefix(bos)} for message in prompt]

    def _plain(self, prompt: str | Messages, tools: list[dict] | None) -> str:
        if tools or not isinstance(prompt, str):
            raise UnusableRow(f"{'tools' if tools else 'chat messages'} need a tokenizer with a chat template")
        return self._trimmed(prompt).removeprefix(self._added_bos())

    def _added_bos(self) -> str:
        """What the tokenizer writes before a text by itself."""
        return self.tokenizer.bos_token if self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id else ""

    def _response_text(self, turn: str) -> str:
        """Without what the template writes around it. Raises UnusableRow for a text that goes on behind its end."""
        text = self._trimmed(turn).removeprefix(self.frame.opening if self.chat else "")
        end = self.tokenizer.convert_ids_to_tokens(self.end_token)
        if text.rstrip().endswith(self._other_ends):
            raise UnusableRow(f"the response ends with a token that ends no turn here: ...{text[-40:]!r}")
        if end in text:
            raise UnusableRow(f"the response goes on behind {end!r}: ...{text.partition(end)[2][:40]!r}")
        return text

    def _trimmed(self, text: str) -> str:
        """Without end tokens that the text itself brings along."""
        return self._ending.sub("", text)


def as_text(prompt: str | Messages) -> str:
    """A prompt to read: a single question as it is, a longer conversation with who says what."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def turn_text(turn: Turn) -> str:
    """A response to read: its text, and the calls that it makes."""
    if isinstance(turn, str):
        return turn
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in turn.get("tool_calls") or []]
    return "\n".join([turn["content"]] * bool(turn["content"]) + calls)


def _user(text: str) -> dict:
    return {"role": "user", "content": text}
