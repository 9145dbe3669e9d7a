"""What a unit's outcome depends on, as a flat mapping of names, and how two of them differ."""

from collections.abc import Mapping

from allo_fast.config import generates_answers
from allo_fast.data.sources import split_slice
from allo_fast.data.verifier import is_own

Basis = dict[str, object]

# How a stage is driven, not what comes of it; the last part of a key, or all of it.
_DRIVING = {"save_steps", "save_minutes", "skip_nonfinite_steps", "sample.batch_size"}
_DRIVING |= {f"sample.server.{name}" for name in ("url", "api_key_env", "concurrency", "timeout", "retries")}


def flat(section: Mapping, prefix: str = "") -> Basis:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    entries = {}
    for key, value in section.items():
        entries |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return entries


def under(entries: Basis, sections: tuple[str, ...]) -> Basis:
    """The entries that are, or lie in, one of `sections`."""
    beginnings = tuple(f"{name}." for name in sections)
    return {key: value for key, value in entries.items() if f"{key}.".startswith(beginnings)}


def differences(old: Basis, new: Basis) -> str:
    """Of at most five entries what they were and are; empty where nothing differs."""
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    said = [f"{key} was {_shown(old, key)}, now {_shown(new, key)}" for key in keys[:5]]
    return ", ".join(said + [f"and {len(keys) - 5} more"] * (len(keys) > 5))


def deciding(entries: Basis) -> Basis:
    """Those that what comes of a stage depends on: how often it looks at held-out pairs, only where they decide; where
    answers end, only where models are asked for them."""
    for section in ("warmup", "learn"):
        looks = [f"{section}.{name}" for name in ("early_stopping_patience", "load_best_model_at_end", "eval_steps")]
        if not any(entries.get(key) for key in looks[:2]):
            entries = {key: value for key, value in entries.items() if key not in looks}
    if (choices := entries.get("evaluate.choices")) and not generates_answers(entries["data.format"], choices):
        entries = {key: value for key, value in entries.items() if key != "sample.stop"}
    return {key: value for key, value in entries.items() if _DRIVING.isdisjoint((key, key.rpartition(".")[2]))}


def part_of(source: str) -> str:
    """Which rows of a data set: [i:j]; which function of a scorer's file."""
    if is_own(source):
        return source.rpartition(":")[2]
    _, start, stop = split_slice(source)
    return "all" if (start, stop) == (0, None) else f"[{start}:{'' if stop is None else stop}]"


def naming_files(entries: Basis) -> set[str]:
    """The keys that name files; of these the entries `KEY: FILE` hold the contents."""
    return {key.partition(": ")[0] for key in entries if ": " in key}


def inside(entries: Basis, naming: set[str]) -> Basis:
    """Without what `naming` says, and what lies there, outside of the run."""
    return {key: value for key, value in entries.items() if key.partition(": ")[0] not in naming}


def _shown(entries: Basis, key: str) -> str:
    value = entries.get(key, "not there")
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if is_digest else str(value)
