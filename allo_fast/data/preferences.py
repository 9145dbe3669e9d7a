"""A preference row is a conversation: its context, and responses of which some are better than others.

Reads every usual layout; a row that would lose something on the way is set aside with the reason.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache

from allo_fast.data.conversations import MEDIA, Messages, as_messages, functions, parse_transcript, text
from allo_fast.data.sources import UnusableRow, lacks, parse_json

Turn = str | dict  # an assistant's message: its text, or the whole message where it has more than text

PROMPTS = ("prompt", "question", "instruction", "query", "input", "conversations", "messages", "context", "history")
SYSTEMS = ("system", "system_prompt", "system_message")
CONTEXT = (  # is read, or the row is set aside
    *(*PROMPTS, *SYSTEMS, *MEDIA, "tools", "functions", "documents", "document", "passage", "knowledge", "preamble"),
    *("dialog", "dialogue", "persona", "background", "article", "source_document", "sys", "previous_messages"),
    *("chat_history", "system_instruction", "sys_prompt", "custom_system_prompt", "chat_template_kwargs"),
)
_TEXTUAL = tuple({*CONTEXT} - {*MEDIA, "tools", "functions"})
_BETTER = {"chosen": "rejected", "chosen_response": "rejected_response", "preferred_output": "non_preferred_output"}
_LISTS = ("responses", "completions", "answers", "generations")
_TEXTS = ("response", "completion", "answer", "generation", "text", "content")
_RATINGS = {"score": 1, "scores": 1, "overall_score": 1, "rating": 1, "ratings": 1, "rank": -1, "ranks": -1}
_PAIRED = {  # two responses, and which values of a third field say that the first is the better one, or the second
    ("response_0", "response_1", "better_response_id"): ((0,), (1,)),
    ("human_ref_A", "human_ref_B", "labels"): ((1,), (0,)),
    ("response1", "response2", "overall_preference"): ((-3, -2, -1), (1, 2, 3)),
    ("response_a", "response_b", "winner"): (("response_a", "model_a", "a"), ("response_b", "model_b", "b")),
    ("conversation_a", "conversation_b", "winner"): (("model_a",), ("model_b",)),
}


@dataclass(frozen=True)
class Preference:
    """prompt: a text as it stands, or messages. plain_prompt: the text that a model without a chat template continues.

    right, wrong: one of them may be empty where the row is a single judged completion.
    """

    prompt: str | Messages
    right: tuple[Turn, ...]
    wrong: tuple[Turn, ...]
    tools: list[dict] | None = None
    plain_prompt: str | None = None


def read_preference(row: dict) -> Preference:
    """Raises UnusableRow where the row is in no layout that is read, or would lose a part of its context.

    Responses: chosen, rejected (texts, messages, whole conversations, transcripts "\\n\\nHuman: ..."; either may be a
    list of such); messages with rejected_response; preferred_output, non_preferred_output; two responses with the
    field that says which is better (`_PAIRED`), or response_j (better) and response_k; responses, completions, answers
    or generations with scores or ranks; completion and label. The prompt is one of PROMPTS, with a system text, a
    history of earlier turns and tools; without any, it is what chosen and rejected begin with.
    """
    right, wrong, used = _sides(row)
    prompt, tools, plain = _prompt(row, used)
    if left := _context_of(row, used, (*right, *wrong, prompt)):
        raise UnusableRow(f"{left}: looks like context, and is not read beside {', '.join(sorted(used))}")
    parsed = prompt is None or plain is not None  # else a dialogue is an answer like any other
    read = [_response(value, "chosen", parsed) for value in right]
    read += [_response(value, "rejected", parsed) for value in wrong]
    empty = [] if used & {*PROMPTS} else [name for name in PROMPTS if name in row]
    if empty and not any(response.context for response in read):  # else it stands in the responses
        raise UnusableRow(f"{empty[0]}: empty; leave the field out where chosen and rejected begin with the prompt")
    if prompt is None and right and wrong and all(isinstance(r.turn, str) and not r.context for r in read):
        prompt = _common_beginning([response.turn for response in read])
        read = [replace(response, turn=response.turn[len(prompt) :]) for response in read]
    asked = next((response.context for response in read if response.context), None)
    prompt = asked if prompt is None and not all(response.context for response in read) else prompt
    contexts = [_joined(prompt, response) for response in read]
    if any(context != contexts[0] for context in contexts):
        raise UnusableRow("chosen and rejected answer different contexts")
    turns = [response.turn for response in read]
    if plain is not None and contexts[0][-1]["role"] != "assistant":
        turns = [turn.lstrip() if isinstance(turn, str) else turn for turn in turns]
    right, wrong = _disjoint(turns[: len(right)], turns[len(right) :])
    plain = contexts[0] if isinstance(contexts[0], str) else plain or read[0].plain_prompt
    return Preference(contexts[0], right, wrong, tools, plain)


def _context_of(row: dict, used: set[str], known: Sequence) -> str:
    """A field that looks like context, however it is written, is none of `used` and says nothing that is known."""
    names = {key: key.strip().casefold() for key in row if key not in used and row[key] and row[key] not in known}
    for key, name in names.items():
        if meant := _meant(name) if isinstance(row[key], str | list | dict) else name if name in CONTEXT else "":
            return key if key == meant else f"{key!r}, not {meant!r}"
    return ""


@lru_cache
def _meant(name: str) -> str:
    """Which context's name that is, or misspells; none: nothing. Each row asks for the same few."""
    is_word = re.fullmatch(r"[a-z_]+(?<!_id)", name)
    near = [name] if name in CONTEXT else get_close_matches(name, _TEXTUAL, 1, 0.9) if is_word else []
    return near[0] if near and near[0][0] == name[0] else ""


@dataclass(frozen=True)
class _Response:
    context: Messages
    turn: Turn
    name: str
    plain_prompt: str | None = None  # of a transcript, what stands before the turn


def _sides(row: dict) -> tuple[list, list, set[str]]:
    """Raw better and worse responses, and the fields that they were read from."""
    for better, worse in _BETTER.items():
        if better in row or (worse in row and "messages" not in row):
            return _listed(row, better), _listed(row, worse), {better, worse}
    if "rejected_response" in row and "messages" in row:
        return [row["messages"]], _listed(row, "rejected_response"), {"messages", "rejected_response"}
    if "response_j" in row and "response_k" in row:
        return [row["response_j"]], [row["response_k"]], {"response_j", "response_k"}
    for (first, second, verdict), (better, worse) in _PAIRED.items():
        if {first, second, verdict} <= row.keys():
            said = _number(row[verdict])
            if said not in (*better, *worse):
                raise UnusableRow(f"{verdict}: expected one of {(*better, *worse)}, got {row[verdict]!r}")
            pair = [row[first]], [row[second]]
            return *(pair if said in better else reversed(pair)), {first, second, verdict}
    if "completion" in row and "label" in row:
        label = _label(row["label"])
        return [row["completion"]] * label, [row["completion"]] * (not label), {"completion", "label"}
    for name in _LISTS:
        if isinstance(row.get(name), list):
            return _ranked(row, name)
    raise lacks(row, "chosen")


def _listed(row: dict, name: str) -> list:
    """A response, or several: a list whose elements are not messages."""
    if name not in row:
        raise lacks(row, name)
    value = row[name]
    several = isinstance(value, list) and value and not any(isinstance(item, dict) for item in value)
    return value if several else [value]


def _number(value: object) -> object:
    """Of a table's cell, which may be a text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value) else value


def _label(value: object) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    if str(value).lower() not in known:
        raise UnusableRow(f"label: expected true or false, got {value!r}")
    return known[str(value).lower()]


def _ranked(row: dict, name: str) -> tuple[list, list, set[str]]:
    """The best of a list, by score or rank, against all that are below it."""
    items, used = row[name], {name}
    if all(isinstance(item, dict) for item in items):
        if own := next(filter(None, (_context_of(item, used, (*row.values(),)) for item in items)), None):
            raise UnusableRow(f"{name}: {own} of one response: looks like context, and is not read")
        key = next((key for key in _RATINGS if items and all(key in item for item in items)), None)
        field = next((field for field in _TEXTS if items and all(field in item for item in items)), None)
        texts, ratings = [item.get(field) for item in items], [item.get(key) for item in items]
    else:
        key = next((key for key in _RATINGS if isinstance(row.get(key), list)), None)
        texts, ratings, used = items, row.get(key), {name, key}
    if key is None or len(texts) != len(ratings):
        raise UnusableRow(f"{name}: expected a rating of each, as one of {', '.join(_RATINGS)}")
    ratings = [_number(rating) for rating in ratings]
    if not all(isinstance(rating, int | float) and rating == rating for rating in ratings):
        raise UnusableRow(f"{key}: expected numbers, got {ratings!r}")
    if len(set(ratings)) == 1:
        raise UnusableRow(f"{key}: all are rated {ratings[0]}")
    values = [_RATINGS[key] * rating for rating in ratings]
    best = max(values, default=0)
    sides = ([t for t, v in zip(texts, values, strict=True) if (v == best) == better] for better in (True, False))
    return *sides, used


def _prompt(row: dict, used: set[str]) -> tuple[str | Messages | None, list[dict] | None, str | None]:
    """The prompt, the tools, and of a prompt that is a transcript its text; adds to `used` what they were read from."""
    name = next((name for name in PROMPTS if name not in used and row.get(name) not in (None, "", [])), None)
    value, plain, messages = row.get(name), None, None
    if name == "input" and isinstance(value, dict) and "messages" in value:  # the request of a chat interface
        value, row = value["messages"], {**row, "tools": value.get("tools")}
    if name == "instruction" and row.get("input"):
        value = f"{text(value, name)}\n{text(row['input'], 'input')}"
        used.add("input")
    if name:
        used.add(name)
        messages = as_messages(value, name)
        if messages is None and (messages := parse_transcript(text(value, name), name)):
            plain, messages = value, messages if messages[-1]["content"] else messages[:-1]
    earlier = _system(row, used) + _history(row, used)
    if earlier:
        messages, plain = messages or ([{"role": "user", "content": value}] if name else []), None
        messages = [message for message in earlier if message not in messages[:1]] + messages
        if len({m["content"] for m in messages if m["role"] in ("system", "developer")}) > 1:
            raise UnusableRow("a system text beside another one")
    return messages or value, _tools(row, used), plain


def _system(row: dict, used: set[str]) -> Messages:
    name = next((name for name in SYSTEMS if isinstance(row.get(name), str) and row[name].strip()), None)
    used.update([name] if name else [])
    return [{"role": "system", "content": text(row[name], name)}] if name else []


def _history(row: dict, used: set[str]) -> Messages:
    """Earlier turns: messages, or pairs of a question and its answer."""
    value = row.get("history")
    if "history" in used or not value:
        return []
    used.add("history")
    pairs = value if isinstance(value, list) and all(isinstance(item, list) for item in value) else None
    if pairs is None or not all(len(pair) == 2 for pair in pairs):
        if (messages := as_messages(value, "history")) is None:
            raise UnusableRow(f"history: expected pairs or messages, got {value!r:.80}")
        return messages
    said = [text(part, "history") for pair in pairs for part in pair]
    return [{"role": ("user", "assistant")[place % 2], "content": part} for place, part in enumerate(said)]


def _tools(row: dict, used: set[str]) -> list[dict] | None:
    if not (value := row.get("tools")):
        return None
    used.add("tools")
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except UnusableRow as error:
            raise UnusableRow(f"tools: {error}") from None
    return functions(value, "tools")


def _common_beginning(texts: list[str]) -> str:
    """What all begin with, up to the end of a word."""
    if not (common := re.match(r"(?:.*(?=\s))?", os.path.commonprefix(texts), re.DOTALL)[0].rstrip()):
        raise UnusableRow("no field 'prompt', and chosen and rejected begin with nothing in common")
    return common


def _response(value: object, name: str, parsed: bool) -> _Response:
    """parsed: a text may be a transcript, whose last turn is the response."""
    messages, plain = as_messages(value, name) if isinstance(value, dict | list | str) else None, None
    if messages is None:
        if not parsed or not (messages := parse_transcript(text(value, name), name)):
            return _Response([], text(value, name), name)
        plain = value[: value.rstrip().rfind("\n\nAssistant:")] + "\n\nAssistant:"
    if messages[-1]["role"] != "assistant":
        raise UnusableRow(f"{name}: the last message is the {messages[-1]['role']}'s, not the assistant's")
    last = messages[-1]
    if plain is not None:
        text(last["content"], name)
    return _Response(messages[:-1], last["content"] if last.keys() == {"role", "content"} else last, name, plain)


def _joined(prompt: str | Messages | None, response: _Response) -> str | Messages:
    """The context of one response: the prompt, and what of the conversation the response brings along."""
    own, asked = response.context, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not own:
        if not prompt:
            raise UnusableRow(f"no field 'prompt', and {response.name} is no conversation")
        return prompt
    if not asked or any(own[i : i + len(asked)] == asked for i in range(len(own))):
        return own
    if asked[-len(own) :] == own:
        return asked
    system = ("system", "developer")
    if all(message["role"] in system for message in asked) and own[0]["role"] not in system:
        return [*asked, *own]
    if own[0]["role"] in ("assistant", "tool"):
        return [*asked, *own]
    raise UnusableRow(f"{response.name}: its conversation is not the prompt's")


def _disjoint(right: list[Turn], wrong: list[Turn]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """Each response once. Raises UnusableRow for one that is better and worse, but for white space at its end."""
    worse = [without_end(turn) for turn in wrong]
    if both := [turn for turn in right if without_end(turn) in worse]:
        equal = len(right) == len(wrong) == 1
        but = "" if both[0] in wrong else ", but for white space at the end"
        raise UnusableRow(f"chosen and rejected are equal{but}" if equal else f"both chosen and rejected: {both[0]!r}")
    return distinct(right), distinct(wrong)


def without_end(turn: Turn) -> Turn:
    return turn.rstrip() if isinstance(turn, str) else {**turn, "content": turn["content"].rstrip()}


def distinct(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Each once, in order."""
    kept: list[Turn] = []
    for turn in turns:
        kept += [turn] * (turn not in kept)
    return tuple(kept)
