"""What is compared: a YAML file that names a job, and the arms, each with a few settings of its own. What judges
(seeds, test data, scorer) is the same for all.

    job: quickstart.yaml                      # beside this file
    development: arithmetic:train[200000:200500]
    arms:
      dpo: {method: dpo, warmup.learning_rate: {best: [1e-5, 3e-5]}}
      sparse: {method: sparse-dpo, learn.ratio: {each: [0.01, 0.1]}, learn.learning_rate: {best: [3e-5, 1e-4]}}

`each` makes an arm of every value, `best` takes the value that is best on `development`; of several keys, all of their
combinations.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from os.path import realpath
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from allo_fast.config import Config, UserError
from allo_fast.config_file import explained, load_config, read_yaml
from allo_fast.data.sources import split_slice
from allo_fast.report.summary import ACCURACIES
from allo_fast.section import Section

Values = dict[str, Any]  # by dotted key of the job's configuration
_CHOICES = ("each", "best")
# What all arms are judged by, and where they lie.
_JUDGES = "seeds data.test data.scorer data.format evaluate.* sample.stop name output_dir rivals deepspeed".split()


class CompareConfig(Section):
    job: str  # the configuration that all arms share, a path from this file's folder
    # Of the job, for all arms. `name`: of the comparison, whose folder is output_dir/name; by default the file's.
    set: Values = {}
    development: str | None = None  # the data source, as data.test, on which `best` values are chosen
    # With these seeds. One of the job's would be reported with the luck that chose it. null: the next behind those.
    development_seeds: list[int] | None = Field(None, min_length=1)
    metric: Literal[tuple(ACCURACIES.values())] = ACCURACIES["logps"]  # of `data.format: preference`, as the summary's
    against: list[str] = Field(["base"], min_length=1)  # of these, `base` or arms, the difference to each arm is shown
    arms: dict[str, Values] = Field(min_length=1)  # by name

    @model_validator(mode="after")
    def _consistent(self):
        for key, values in self._choices():
            if not isinstance(values, list) or not values:
                raise ValueError(f"arms.{key}: expected a list of values, got {values!r:.200}")
            if key.endswith(".each") and any(other == key.replace(".each", ".best") for other, _ in self._choices()):
                raise ValueError(f"arms.{key}: `best` of the same key; one of both")
        named = self.named
        for arm in named.values():
            if twice := [values for values in arm.candidates if arm.candidates.count(values) > 1]:
                raise ValueError(f"arms.{arm.name}: `best` has {twice[0]} twice")
        chooses = any(key.endswith(".best") for key, _ in self._choices())
        if chooses and not self.development:
            raise ValueError("development: on which data are the `best` values chosen? Name some beside data.test")
        if self.development and not chooses:
            raise ValueError("development: no arm has `best` values to choose")
        if unknown := [name for name in self.against if name != "base" and name not in named]:
            raise ValueError(f"against: no arm is called {unknown[0]}; there are base, {', '.join(named)}")
        return self

    def _choices(self) -> Iterator[tuple[str, Any]]:
        for name, values in self.arms.items():
            for key, value in _flat(values).items():
                if key.rpartition(".")[2] in _CHOICES:
                    yield f"{name}.{key}", value

    @property
    def named(self) -> dict[str, "Arm"]:
        arms = [arm for name, values in self.arms.items() for arm in _arms(name, values)]
        names = [arm.name for arm in arms]
        if "base" in names:
            raise ValueError("arms.base: that is what the model is called before it is trained")
        if twice := [name for name in names if names.count(name) > 1 or not name.strip()]:
            raise ValueError(f"arms: each needs a name of its own, got {twice[0]!r}")
        for arm in arms:
            keys = [*arm.settings, *arm.candidates[0]]
            if judging := [key for key in keys if any(fnmatch(key, pattern) for pattern in _JUDGES)]:
                raise ValueError(f"arms.{arm.name}: {judging[0]} is of all arms alike; move it to `set`")
        return dict(zip(names, arms, strict=True))


@dataclass(frozen=True)
class Arm:
    """One method. candidates: values to choose between, {} alone where there is nothing to choose."""

    name: str
    settings: Values
    candidates: tuple[Values, ...]


def _arms(name: str, values: Mapping) -> Iterator[Arm]:
    entries = _flat(values)
    each, best = ({key.rpartition(".")[0]: v for key, v in entries.items() if key.endswith(f".{c}")} for c in _CHOICES)
    fixed = {key: value for key, value in entries.items() if key.rpartition(".")[2] not in _CHOICES}
    candidates = tuple(_combined(best))
    for chosen in _combined(each):
        label = ", ".join([name, *(shown(value) for value in chosen.values())])
        yield Arm(label, fixed | chosen, candidates)


def _combined(values: Mapping[str, list]) -> Iterator[Values]:
    return (dict(zip(values, combination, strict=True)) for combination in product(*values.values()))


def shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Trial:
    """A run of one arm with one candidate; of all that it makes, only the predictions count."""

    arm: Arm
    values: Values
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / self.config.name

    @property
    def label(self) -> str:
        return ", ".join([self.arm.name, *(f"{key} {shown(value)}" for key, value in self.values.items())])


@dataclass(frozen=True)
class Comparison:
    """What a file says, with overrides of the job on top."""

    config: CompareConfig
    job: Path
    words: tuple[str, ...]  # overrides of the job, for all arms
    folder: Path
    dtype: str  # of the model, where the job leaves it to the machine
    seeds: list[int]
    development_seeds: list[int]

    @classmethod
    def load(cls, path: Path, overrides: list[str]) -> "Comparison":
        """Raises UserError for what does not fit, with the key, of the file as of the job."""
        try:
            config = CompareConfig.model_validate(read_yaml(path))
        except ValidationError as error:
            raise UserError(f"{path}: {explained(error, CompareConfig)}") from None
        words = [*_words({"name": path.stem, **_flat(config.set)}), *overrides]
        job = path.parent / config.job
        common = load_config(job, words)
        if common.deepspeed:
            raise UserError("deepspeed: a comparison's runs are one process each; start the command once a device")
        if common.data.test_size:
            raise UserError(f"{path}: data.test: a comparison needs one beside data.train; {job} names none")
        if "metric" in config.model_fields_set and common.data.format != "preference":
            raise UserError(f"{path}: metric: of data.format: preference; {job} has {common.data.format}")
        for key in ("test", "train") if config.development else ():
            if _overlap(config.development, other := getattr(common.data, key)):
                raise UserError(f"{path}: development: {config.development} shares rows with data.{key}, {other}")
        folder, choosing = Path(common.output_dir) / common.name, config.development_seeds or [max(common.seeds) + 1]
        return cls(config, job, tuple(words), folder, common.model.dtype, common.seeds, choosing)

    @property
    def arms(self) -> list[Arm]:
        return [*self.config.named.values()]

    def development(self, arm: Arm) -> list[Trial]:
        """A run of each candidate; none where there is nothing to choose."""
        if len(arm.candidates) < 2:
            return []
        more = {"data.test": self.config.development, "seeds": self.development_seeds}
        return [self._trial(arm, values, more) for values in arm.candidates]

    def final(self, arm: Arm, values: Values) -> Trial:
        return self._trial(arm, values, {})

    def _trial(self, arm: Arm, values: Values, more: Values) -> Trial:
        name = "-".join([*([] if more else ["final"]), *(f"{key}={value}" for key, value in values.items())])
        place = {"output_dir": str(self.folder / _slug(arm.name)), "name": _slug(name), "rivals": []}
        place |= {"evaluate.samples": 0}  # which nobody would read
        try:
            config = load_config(self.job, [*self.words, *_words(arm.settings | values | more | place)], self.dtype)
        except UserError as error:
            raise UserError(f"arms: {arm.name}: {error}") from None
        if config.rounds > 1:
            raise UserError(f"arms: {arm.name}: rounds: {config.rounds}; a comparison's runs have one round each")
        return Trial(arm, values, config)


def _words(values: Values) -> list[str]:
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in values.items()]


def _slug(name: str) -> str:
    """As a folder may be called, another for each name."""
    plain = re.sub(r"[^\w.=+-]+", "-", name, flags=re.ASCII)[:100]
    is_plain = (
        plain == name
        and re.match(r"[^\W_]", name)
        and not name.startswith(("cache", "compare"))
        and not name.endswith(".svg")
    )
    return plain if is_plain else f"arm-{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _flat(values: Mapping, prefix: str = "") -> Values:
    """By dotted key; an empty section, as `sft: {}`, is a value. 1e-5, which YAML 1.1 takes for a text, is a number."""
    entries = {}
    for key, value in values.items():
        entries |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: _number(value)}
        )
    return entries


def _number(value: object) -> object:
    if isinstance(value, list):
        return [_number(each) for each in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value


def _overlap(first: str, second: str) -> bool:
    """Whether two data sources, as far as their names say, share rows."""
    (name, begin, end), (other, other_begin, other_end) = split_slice(first), split_slice(second)
    last, other_last = (float("inf") if stop is None else stop for stop in (end, other_end))
    return realpath(name) == realpath(other) and max(begin, other_begin) < min(last, other_last)
