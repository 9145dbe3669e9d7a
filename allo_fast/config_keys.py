"""Every key of the configuration, with its default, what it takes, and what the comment beside it says."""

import argparse
import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import get_args

from pydantic.fields import FieldInfo

from allo_fast.config import Config, UserError
from allo_fast.config_file import NAMES_ELSEWHERE, NOT_KEYS
from allo_fast.config_sections import RewardSource, Score
from allo_fast.config_train import Loss, TrainConfig
from allo_fast.section import Section

_BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}
_ALIASES = {"Loss": Loss, "Score": Score, "RewardSource": RewardSource}
_SHORT = {"str": "text", "bool": "true, false", "int": "whole number", "float": "number", "None": "null"}


@dataclass(frozen=True)
class Key:
    """takes: in words. default: as YAML; None of a key that must be set. about: the comment."""

    name: str
    default: str | None
    takes: str
    about: str

    @property
    def line(self) -> str:
        shown = "must be set" if self.default is None else f"default {self.default}"
        return textwrap.fill(
            f"{self.name}: {shown}; {self.takes}. {self.about}".rstrip(), 100, subsequent_indent="    "
        )


def print_keys(options: argparse.Namespace) -> None:
    """Those whose name or comment has the word. Raises UserError where none has."""
    if options.markdown:
        print(as_markdown(), end="")
        return
    word = options.word.lower()
    ours = NAMES_ELSEWHERE.get(word, "\0")
    found = [
        key.line
        for key in keys_of(Config)
        if word in f"{key.name} {key.about}".lower() or f".{key.name}".endswith(f".{ours}")
    ]
    if not found:
        why = NOT_KEYS.get(word, "in no key's name or explanation")
        raise UserError(f"{options.word}: {why}")
    print("\n".join(found))


def keys_of(section: type[Section], prefix: str = "") -> Iterator[Key]:
    """In the order of the source; those of a section behind it."""
    about = _comments(section)
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is None or field.default is None:
            yield Key(prefix + name, _default(field), _takes(section, name, field), about.get(name, ""))
        if inner:
            yield from keys_of(inner, f"{prefix}{name}.")


def as_markdown() -> str:
    """Tables, a section each; what all sections that train have stands once."""
    shared = {key.name: key for key in keys_of(TrainConfig)}
    every, by_section = [*keys_of(Config)], {}
    trained = {section for key in every for section, _, last in [key.name.rpartition(".")] if last == "learning_rate"}
    for key in every:
        section, _, last = key.name.rpartition(".")
        common = shared.get(last) if section in trained else None
        if not common or (key.default, key.about) != (common.default, common.about):
            by_section.setdefault(section, []).append(key)
    parts = ["# Every key", "`allo-fast keys --markdown` makes this page, `allo-fast keys WORD` finds a key."]
    parts += [_table([*by_section.pop("")]), "## Sections that train", _table([*shared.values()])]
    parts.insert(
        -1,
        "`pretrain`, `sft`, `warmup`, `rewards.train`, `rewards.dpo`, `forget` and `learn` have these keys, and those "
        "below.",
    )
    for section, keys in by_section.items():
        parts += [f"## {section}", _table(keys)]
    return "\n\n".join(parts) + "\n"


def _table(keys: list[Key]) -> str:
    rows = [("key", "default", "takes", ""), ("---",) * 4]
    rows += [(f"`{key.name}`", key.default or "", key.takes, key.about) for key in keys]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _section_of(field: FieldInfo) -> type[Section] | None:
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.default
    return value if isinstance(value, str) and value else json.dumps(value)


def _takes(section: type[Section], name: str, field: FieldInfo) -> str:
    if inner := _section_of(field):
        return f"the keys `{name}.{next(iter(inner.model_fields))}`, ..., or null"
    bounds = [
        form.format(f"{getattr(limit, kind):g}")
        for limit in field.metadata
        for kind, form in _BOUNDS.items()
        if getattr(limit, kind, None) is not None
    ]
    annotation = next(a for owner in section.__mro__ if (a := _annotations(owner).get(name)))
    return ", ".join([_in_words(ast.parse(annotation, mode="eval").body), *bounds])


def _in_words(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp):
        return f"{_in_words(node.left)} or {_in_words(node.right)}"
    if isinstance(node, ast.Subscript):
        kind, inner = ast.unparse(node.value), node.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if kind == "Literal":
            return ", ".join(str(ast.literal_eval(part)) for part in parts)
        if kind == "dict":
            return "keys and values"
        return "a list: " * (kind == "list") + _in_words(parts[0])
    name = ast.unparse(node)
    alias = _ALIASES.get(name)
    return ", ".join(get_args(alias)) if alias else _SHORT.get(name, name)


def _annotations(owner: type) -> dict[str, str]:
    """By name, as the source has them."""
    return {node.target.id: ast.unparse(node.annotation) for node, _ in _fields(owner)}


def _comments(section: type[Section]) -> dict[str, str]:
    """By name; of a key that a section has from another and only gives another default, the other's."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        found |= {node.target.id: about for node, about in _fields(owner) if about}
    return found


@cache
def _fields(owner: type) -> list[tuple[ast.AnnAssign, str]]:
    """Of a class its own, each with its comment: the lines above it, then what stands behind it."""
    if not (issubclass(owner, Section) and owner is not Section):
        return []
    source = textwrap.dedent(inspect.getsource(owner))
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        first = node.lineno - 1
        above = first
        while lines[above - 1].strip().startswith("#"):
            above -= 1
        words = [line.strip("# ") for line in lines[above:first]]
        behind = lines[node.end_lineno - 1][node.end_col_offset :].strip("# ")
        found.append((node, " ".join([*words, behind]).strip()))
    return found
