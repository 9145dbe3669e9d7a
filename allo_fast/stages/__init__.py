"""The stages in order: pretrain, sft, sample, pairs, warmup, locate, rewards, forget, learn, evaluate.

Each reads files and writes files; what it needs, and which settings it depends on, stands in this table alone.
"""

import hashlib
import os
from pathlib import Path

from allo_fast.config import GRADIENT_SCORES, Config
from allo_fast.data.sources import split_slice
from allo_fast.runs.run import Stage, sha256, versions
from allo_fast.stages import evaluate, forget, learn, locate, pairs, pretrain, rewards, sample, sft, warmup


def _seeds(config: Config) -> list[str]:
    return [f"seed-{seed}" for seed in config.seeds]


def _data_files(source: str | None) -> list[Path]:
    """The file that a data source names, where it names one."""
    path = Path(split_slice(source)[0]) if source else None
    return [path] if path and path.is_file() else []


def _model_files(model: str | None) -> list[Path]:
    """The files of a local model folder."""
    return sorted(path for path in Path(model).iterdir() if path.is_file()) if model and Path(model).is_dir() else []


def _reference_files(section: str):
    """The base's files, and those of the reference model that a section names."""
    return lambda config: _base_files(config) + _model_files(getattr(config, section).reference)


def _base_files(config: Config) -> list[Path]:
    return _model_files(config.model.name_or_path)


def _given(config: Config) -> list[tuple[str, str]]:
    """What made the model that the run begins from, where it did."""
    return [] if config.model.name_or_path else [("pretrain", "base")]


def _needs(*names: str):
    """Units of the same seed; the base model is there for all of them, made here or given."""

    def needs(config: Config, key: str) -> list[tuple[str, str]]:
        base = [("sft", "base")] if config.sft else _given(config)
        return base + [(name, key) for name in names]

    return needs


def _locate_needs(config: Config, key: str) -> list[tuple[str, str]]:
    """Gradients are taken of pairs; another model's change, magnitudes and chance need the base alone."""
    by_score = {"delta": ("warmup",), **dict.fromkeys(GRADIENT_SCORES, ("pairs",))}
    return _needs(*by_score.get(config.located_by, ()))(config, key)


def _learn_needs(config: Config, key: str) -> list[tuple[str, str]]:
    """Without forgetting it starts from the base."""
    return _needs("pairs", "locate", *(["forget"] if config.method == "allo" else []))(config, key)


def _evaluated(config: Config) -> list[str]:
    before = ["given"] if config.sft else []
    return ["base", *before, *(f"{model}-{seed}" for model in config.trained for seed in _seeds(config))]


def _evaluate_needs(config: Config, key: str) -> list[tuple[str, str]]:
    model = evaluate.model_of(key)
    if model == "base":
        return _needs()(config, key)
    producer = evaluate.PRODUCERS[model]
    made = _needs(producer)(config, key.removeprefix(f"{model}-")) if producer else _given(config)
    # All models are judged on the rows that the base was; preferences, against its log-probabilities.
    return [*made, ("evaluate", "base")]


_MODEL = ("model.name_or_path", "model.dtype")
_PROMPTS = (*_MODEL, "data.chat_template", "data.chat_template_kwargs", "data.prompt_template", "data.format")
_LIMITS = ("data.max_prompt_tokens", "data.max_response_tokens")
_DATA = (*_PROMPTS, "data.scorer", *_LIMITS)
_LOCATED = ("locate.clip", "locate.exclude", "locate.pairs")  # of stages that locate for themselves

STAGES = {
    "pretrain": Stage(
        number=0,
        execute=pretrain.execute,
        settings=("pretrain", *_PROMPTS),
        needs=lambda config, key: [],
        keys=lambda config: [] if config.model.name_or_path else ["base"],
    ),
    "sft": Stage(
        number=1,
        execute=sft.execute,
        settings=("sft", "data.train", "sample.max_new_tokens", "model.rounding", *_LOCATED, *_LIMITS, *_PROMPTS),
        needs=lambda config, key: _given(config),
        keys=lambda config: ["base"],
        files=lambda config: _data_files(config.data.train) + _base_files(config),
        seed=lambda config: config.seeds[0],
    ),
    "sample": Stage(
        number=2,
        execute=sample.execute,
        settings=("sample", "protocol", "data.train", *_DATA),
        needs=_needs(),
        keys=_seeds,
        files=lambda config: _data_files(config.data.train) + _base_files(config),
    ),
    "pairs": Stage(number=3, execute=pairs.execute, settings=("pairs",), needs=_needs("sample"), keys=_seeds),
    "warmup": Stage(
        number=4,
        execute=warmup.execute,
        settings=("warmup", *_PROMPTS),
        needs=_needs("pairs"),
        keys=_seeds,
        files=_reference_files("warmup"),
    ),
    "locate": Stage(
        number=5,
        execute=locate.execute,
        # Of `warmup` what a warm-up would be: its steps and learning rates, which `linear` follows.
        settings=("locate", "warmup", "forget.ratio", "learn.ratio", "method", "protocol", *_MODEL),
        needs=_locate_needs,
        keys=_seeds,
        files=lambda config: (
            _base_files(config) + _model_files(config.locate.after) + _model_files(config.warmup.reference)
        ),
    ),
    "rewards": Stage(
        number=6,
        execute=rewards.execute,
        settings=("rewards", "model.rounding", *_LOCATED, *_PROMPTS),
        needs=_needs("sample", "pairs"),
        keys=_seeds,
        files=lambda config: (
            _data_files(config.rewards.path) + _model_files(config.rewards.model) + _base_files(config)
        ),
    ),
    "forget": Stage(
        number=7,
        execute=forget.execute,
        settings=("forget", "protocol", "model.rounding", *_PROMPTS),
        needs=_needs("locate", "rewards"),
        keys=_seeds,
        files=_reference_files("forget"),
    ),
    "learn": Stage(
        number=8,
        execute=learn.execute,
        settings=("learn", "protocol", "model.rounding", *_PROMPTS),
        needs=_learn_needs,
        keys=_seeds,
        files=_reference_files("learn"),
    ),
    "evaluate": Stage(
        number=9,
        execute=evaluate.execute,
        settings=("evaluate", "data.test", *_DATA),
        needs=_evaluate_needs,
        keys=_evaluated,
        files=lambda config: _data_files(config.data.test) + _base_files(config),
    ),
}


def inputs_of(config: Config) -> dict[str, str]:
    """What every rank of a run must have alike, by name: the settings, the software, and each input file.

    Of a file its SHA-256; above 64 MiB the size and both ends: 64 ranks reading 140 GB each would take too long.
    """
    files = {path for stage in STAGES.values() for path in stage.files(config)}
    return {
        "configuration": config.model_dump_json(),
        "software": str(versions()),
        **{str(path): _told_apart(path) for path in sorted(files)},
    }


def _told_apart(path: Path) -> str:
    size = path.stat().st_size
    if size <= 1 << 26:
        return sha256(path)
    with path.open("rb") as file:
        ends = file.read(1 << 20)
        file.seek(-(1 << 20), os.SEEK_END)
        return f"{size} {hashlib.sha256(ends + file.read()).hexdigest()}"


def stages_of(config: Config) -> list[str]:
    """The stages of a run, in order."""
    sparse, allo = config.method != "dpo", config.method == "allo"
    runs = {
        "sft": config.sft is not None,
        "warmup": config.warms_up,
        "locate": sparse,
        "rewards": allo,
        "forget": allo,
        "learn": sparse,
    }
    return [name for name in STAGES if runs.get(name, True)]
