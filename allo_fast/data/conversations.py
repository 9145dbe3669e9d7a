"""Chat messages as rows write them: checked, and brought to one form {"role", "content", ...}."""

import json
import re

from allo_fast.data.sources import UnusableRow, parse_json

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys that templates read beside the content
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_RENDERED = ("name", "tool_calls", "tool_call_id", *THOUGHTS)  # others are about a message, not part of it
_MAY_BE_EMPTY = ("system", "developer", "tool")
_OPENED = r"(?:array\(|\[|\s)*"
_PRINTED = re.compile(  # by Python or numpy, into the cells of a CSV file
    rf"{_OPENED}{{(?=.*'(?:content|value|tool_calls)': )(?=.*'(?:role|from)':{_OPENED}'(?:{'|'.join(ROLES)})')",
    re.DOTALL,
)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")

Messages = list[dict]


def text(value: object, name: str) -> str:
    """A text with something in it that can be written as UTF-8. Raises UnusableRow."""
    if not isinstance(value, str) or not value.strip():
        raise UnusableRow(f"{name}: expected a text, got {value!r}")
    return whole(value, name)


def whole(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow(f"{name}: half a character (a lone surrogate) at {error.start}") from None
    return value


def as_messages(value: object, name: str) -> Messages | None:
    """The messages that `value` is: a list, one message, or either as a JSON string; None for a plain text.

    Raises UnusableRow for messages that lack a role or content, or whose role is not known, and for their Python repr.
    """
    if isinstance(value, str) and _PRINTED.match(value):
        raise UnusableRow(f"{name}: messages as Python prints them; save them as JSON lines or parquet")
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            parsed = parse_json(value)
        except UnusableRow:
            return None
        is_messages = isinstance(parsed, dict | list) and all(map(_is_written, _listed(parsed)))
        value = parsed if parsed and is_messages else value
    if isinstance(value, str):
        return None
    if not isinstance(value, dict | list) or not value:
        raise UnusableRow(f"{name}: expected a text or chat messages, got {value!r:.200}")
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        raise UnusableRow(f"{name}: expected a text or chat messages, got a list of {len(value)} texts, like a column")
    return [_message(message, name) for message in _listed(value)]


def _listed(value: dict | list) -> list:
    """Messages one after another; a table may hold them as one object of lists."""
    lists = isinstance(value, dict) and all(isinstance(items, list) for items in value.values())
    if lists and "role" in value and len({*map(len, value.values())}) == 1:
        return [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) else [value]


def _looks_like(message: object) -> bool:
    return isinstance(message, dict) and ("role" in message or "from" in message)


def _is_written(message: object) -> bool:
    """Whether JSON in a text is a message, and not an answer in JSON."""
    said = _looks_like(message) and message.get("role", message.get("from"))
    return isinstance(said, str) and said in ROLES and bool({"content", "value", "tool_calls"} & message.keys())


def _message(message: object, name: str) -> dict:
    if not _looks_like(message):
        raise UnusableRow(f"{name}: expected chat messages with role and content, got {message!r:.200}")
    said, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(said, str) or said not in ROLES:
        raise UnusableRow(f"{name}: expected a role out of {', '.join(ROLES)}, got {said!r}")
    content = _joined(content, name) if isinstance(content, list) else content
    role, calls = ROLES[said], functions(message.get("tool_calls") or [], f"{name}: tool_calls")
    calls = role == "assistant" and bool(calls)
    if not isinstance(content, str) and not (calls and content is None):
        raise UnusableRow(f"{name}: expected a text as content of the {said}'s message, got {content!r:.200}")
    if not (content or "").strip() and not calls and role not in _MAY_BE_EMPTY:
        raise UnusableRow(f"{name}: the {said}'s message is empty")
    whole(json.dumps(message, ensure_ascii=False, default=str), name)
    if pictures := [key for key in message if key in MEDIA and message[key]]:
        raise UnusableRow(f"{name}: {pictures[0]} in a message; texts alone are read")
    others = {key: message[key] for key in _RENDERED if message.get(key) is not None}
    for key in others.keys() - {"tool_calls"}:
        if not isinstance(others[key], str):
            raise UnusableRow(f"{name}: {key}: expected a text, got {others[key]!r}")
    return {**others, "role": role, "content": content or ""}


def _joined(parts: list, name: str) -> str:
    """A content in parts {"type": "text", "text"}, one behind another as chat templates write them."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    for part, said in zip(parts, texts, strict=True):
        if not isinstance(said, str):
            raise UnusableRow(f"{name}: a part of a message that is no text: {part!r:.80}; texts alone are read")
    return "".join(texts)


def functions(value: object, name: str) -> list[dict]:
    """Calls, or tools that may be called, as they stand. Raises UnusableRow for what is no list of them."""
    if not isinstance(value, list) or not all(map(_is_function, value)):
        raise UnusableRow(f"{name}: expected a list of objects whose names are texts, got {value!r:.200}")
    return value


def _is_function(value: object) -> bool:
    function = value.get("function", value) if isinstance(value, dict) else value
    return isinstance(function, dict) and isinstance(function.get("name", ""), str)


def parse_transcript(value: str, name: str) -> Messages:
    """Of a text "Human: a", "Assistant: b" in paragraphs its messages, the last perhaps empty; none of another text.

    Raises UnusableRow for an empty message before the last.
    """
    turns = list(_TURN.finditer(value))
    if not turns or value[: turns[0].start()].strip() or not {"Human", "Assistant"} <= {turn[1] for turn in turns}:
        return []
    ends = [*(turn.start() for turn in turns[1:]), len(value)]
    said = [(turn[1].lower(), value[turn.end() : end].strip()) for turn, end in zip(turns, ends, strict=True)]
    if not all(content for _, content in said[:-1]):
        raise UnusableRow(f"{name}: an empty turn in {value!r:.120}")
    return [{"role": ROLES[role], "content": content} for role, content in said]
