"""What can happen to the bytes of a file."""

import json
from collections.abc import Callable

Damage = Callable[[bytes], bytes]


def flipped(place: float) -> Damage:
    """One bit, at this share of the file; from -1 on, counted from its end in bytes."""

    def flip(data: bytes) -> bytes:
        at = int(place) if place <= -1 else int(place * len(data))
        changed = bytearray(data)
        changed[at] ^= 1
        return bytes(changed)

    return flip


def truncated(share: float = 0.6) -> Damage:
    return lambda data: data[: int(share * len(data))]


def emptied(data: bytes) -> bytes:
    return b""


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def constant(data: bytes) -> Damage:
    return lambda _: data


def replaced(old: bytes, new: bytes) -> Damage:
    """The first of them."""

    def replace(data: bytes) -> bytes:
        assert old in data, f"{old!r} is not there"
        return data.replace(old, new, 1)

    return replace


def with_value(*keys: str, to: Callable[[object], object]) -> Damage:
    """A JSON file in which the value at `keys` is another."""

    def change(data: bytes) -> bytes:
        content = json.loads(data)
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to(inner[keys[-1]])
        return json.dumps(content, indent=1).encode()

    return change


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    """Of a file of lines, `change` makes other ones."""
    return lambda data: b"".join(change(data.splitlines(keepends=True)))
