"""A configuration from YAML, with dotted overrides on top: strict, and with errors that name the key.

A run keeps its own as config.yaml.
"""

import difflib
from pathlib import Path
from typing import get_args

import yaml
from pydantic import ValidationError

from allo_fast.config import Config, Section, UserError


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """The configuration in a YAML file, with `key.subkey=value` overrides (values are YAML) on top.

    Raises UserError for a missing file, YAML that does not parse, unknown keys (naming the nearest known one) and
    values that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    raw = _parse(path.read_text(), str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected keys and values, got {type(raw).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override}: expected key.subkey=value")
        _assign(raw, key, _parse(value, override))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_explained(error.errors()))) from None


def save_config(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))


def _parse(text: str, where: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {error}") from None


def _assign(raw: dict, dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if raw.get(parent) is None:  # `sft: null`, as a run's config.yaml says
            raw[parent] = {}
        raw = raw[parent]
        if not isinstance(raw, dict):
            raise UserError(f"{dotted}: {parent} has no keys of its own")
    raw[last] = value


def _explained(errors: list[dict]) -> list[str]:
    """One sentence a key, also where a value fits none of several types."""
    by_key: dict[str, list[dict]] = {}
    for error in errors:
        by_key.setdefault(_key(error["loc"]), []).append(error)
    return [_explain(key, parts) for key, parts in by_key.items()]


def _key(parts: tuple) -> str:
    """The dotted key of an error; pydantic adds the type that it tried."""
    dotted = [".".join(map(str, parts[:length])) for length in range(len(parts), 0, -1)]
    return next((key for key in dotted if key in known_keys(Config)), dotted[0] if dotted else "")


def _explain(key: str, errors: list[dict]) -> str:
    first = errors[0]
    if first["type"] != "extra_forbidden":
        message = " or ".join(error["msg"] for error in errors)
        suffix = "" if first["type"] == "missing" else f" (got {first['input']!r})"
        return f"{key}: {message}{suffix}" if key else message.removeprefix("Value error, ")
    where, known = ".".join(map(str, first["loc"])), known_keys(Config)
    siblings = [name for name in known if name.rpartition(".")[0] == where.rpartition(".")[0]]
    near = difflib.get_close_matches(where, siblings, n=1) or difflib.get_close_matches(where, known, n=1, cutoff=0.0)
    return f"{where}: unknown key; did you mean {near[0]}?"


def known_keys(section: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys
