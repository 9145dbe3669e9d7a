"""Chat messages as rows write them: checked, and brought to one form {"role", "content", ...}."""

import json
import re

from allo_fast.data.sources import UnusableRow

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

    Raises UnusableRow for messages that lack a role or content, or whose role is not known.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            parsed = json.loads(value)
        except ValueError:
            return None
        is_messages = isinstance(parsed, dict | list) and all(_looks_like(m) for m in _listed(parsed))
        value = parsed if parsed and is_messages else value
    if isinstance(value, str):
        return None
    if not isinstance(value, dict | list) or not value:
        raise UnusableRow(f"{name}: expected chat messages with role and content, got {value!r}")
    return [_message(message, name) for message in _listed(value)]


def _listed(value: dict | list) -> list:
    return value if isinstance(value, list) else [value]


def _looks_like(message: object) -> bool:
    return isinstance(message, dict) and ("role" in message or "from" in message)


def _message(message: object, name: str) -> dict:
    if not _looks_like(message):
        raise UnusableRow(f"{name}: expected chat messages with role and content, got {message!r}")
    said, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if said not in ROLES:
        raise UnusableRow(f"{name}: expected a role out of {', '.join(ROLES)}, got {said!r}")
    role = ROLES[said]
    calls = role == "assistant" and bool(message.get("tool_calls"))
    if not isinstance(content, str) and not (calls and content is None):
        raise UnusableRow(f"{name}: expected chat messages with role and content, got {message!r}")
    if not (content or "").strip() and not calls and role not in _MAY_BE_EMPTY:
        raise UnusableRow(f"{name}: expected chat messages with role and content, got {message!r}")
    whole(json.dumps(message, ensure_ascii=False, default=str), name)
    if pictures := [key for key in message if key in MEDIA and message[key]]:
        raise UnusableRow(f"{name}: {pictures[0]} in a message; texts alone are read")
    others = {key: message[key] for key in _RENDERED if message.get(key) is not None}
    return {**others, "role": role, "content": content or ""}


def parse_transcript(value: str) -> tuple[Messages, str]:
    """ "\\n\\nHuman: a\\n\\nAssistant: b" -> the messages before the last `Assistant:`, and what follows it.

    No messages where the text is no such transcript.
    """
    turns = list(_TURN.finditer(value))
    if not turns or turns[0].start() != 0 and value[: turns[0].start()].strip() or turns[-1][1] != "Assistant":
        return [], value
    ends = [turn.start() for turn in turns[1:]]
    messages = [
        {"role": ROLES[turn[1].lower()], "content": value[turn.end() : end].strip()}
        for turn, end in zip(turns, ends, strict=False)
    ]
    return messages, value[turns[-1].end() :].strip()


def as_transcript(messages: Messages) -> str:
    """The same messages as a text that a base model continues with " " and a response."""
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages) + "\n\nAssistant:"
