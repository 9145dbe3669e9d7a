"""The stages in order: pretrain, sft, sample, pairs, warmup, locate, rewards, forget, learn, evaluate.

Each reads files and writes files; what it needs, and which settings it depends on, stands in this table alone.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from allo_fast.config import GRADIENT_SCORES, Config
from allo_fast.data.sources import source_files
from allo_fast.data.verifier import file_of, is_own, reward_model_of
from allo_fast.durable import versions
from allo_fast.model.loading import model_files
from allo_fast.model.reward import reward_model_files
from allo_fast.runs.basis import flat
from allo_fast.runs.contents import sha256
from allo_fast.runs.unit import Stage
from allo_fast.stages import evaluate, forget, learn, locate, pairs, pretrain, rewards, sample, sft, warmup


def _seeds(config: Config) -> list[str]:
    return [f"seed-{seed}" for seed in config.seeds]


def _files(*keys: str) -> Callable[[Config], dict[str, dict[str, Path]]]:
    """By each of these keys, and the base's, the files that it names, where they lie here."""

    def files(config: Config) -> dict[str, dict[str, Path]]:
        values = flat(config.model_dump())
        values["data.scorer"] = values["data.scorer"] if config.generates_answers else None
        named = [key for key in ("model.name_or_path", *keys) if values[key]]
        by_key = {key: _READ.get(key, model_files)(values[key]) for key in named}
        return {key: files for key, files in by_key.items() if files}

    return files


def _rows(source: str) -> dict[str, Path]:
    """Of a set of several its rows are in the order of these."""
    paths = source_files(source)
    names = [f"file {n} of {len(paths)}" if len(paths) > 1 else "the file" for n in range(1, len(paths) + 1)]
    return {name: path for name, path in zip(names, paths, strict=True) if path.is_file()}


def _one_file(path: str) -> dict[str, Path]:
    return {"the file": Path(path)} if os.path.isfile(path) else {}


def _scorer(scorer: str) -> dict[str, Path]:
    if path := reward_model_of(scorer):
        return reward_model_files(path)
    return _one_file(str(file_of(scorer))) if is_own(scorer) else {}


# All others name models.
_READ = {
    "data.train": _rows,
    "data.test": _rows,
    "data.text": _rows,
    "data.scorer": _scorer,
    "rewards.path": _one_file,
}


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


_MODEL = ("model.name_or_path", "model.dtype", "model.attn_implementation")
_PROMPTS = (*_MODEL, "data.chat_template", "data.chat_template_kwargs", "data.prompt_template", "data.format")
_LIMITS = ("data.max_prompt_tokens", "data.max_response_tokens")
_DATA = (*_PROMPTS, "data.scorer", *_LIMITS)
_TRAIN = ("data.train", "data.test_size")
_LOCATED = ("locate.clip", "locate.exclude", "locate.pairs")  # of stages that locate for themselves

_SAVED = ("model/**/*",)
_LOCATING = ("selection.safetensors", "locating.json")  # of stages that locate for themselves
_RENDERED = ("problems.jsonl", "quarantine.jsonl")

STAGES = {
    "pretrain": Stage(
        number=0,
        execute=pretrain.execute,
        outputs=_SAVED,
        settings=("pretrain", *_PROMPTS),
        needs=lambda config, key: [],
        keys=lambda config: [] if config.model.name_or_path else ["base"],
    ),
    "sft": Stage(
        number=1,
        execute=sft.execute,
        outputs=(*_SAVED, "delta.safetensors", *_RENDERED),
        copies=_LOCATING,
        settings=("sft", *_TRAIN, "sample.max_new_tokens", "model.rounding", *_LOCATED, *_LIMITS, *_PROMPTS),
        needs=lambda config, key: _given(config),
        keys=lambda config: ["base"],
        files=_files("data.train"),
        seed=lambda config: config.seeds[0],
    ),
    "sample": Stage(
        number=2,
        execute=sample.execute,
        outputs=("responses.jsonl", *_RENDERED),
        settings=("sample", "protocol", *_TRAIN, *_DATA),
        needs=_needs(),
        keys=_seeds,
        files=_files("data.train", "data.scorer"),
    ),
    "pairs": Stage(
        number=3,
        execute=pairs.execute,
        outputs=("pairs.jsonl", "eval_pairs.jsonl"),
        settings=("pairs",),
        needs=_needs("sample"),
        keys=_seeds,
    ),
    "warmup": Stage(
        number=4,
        execute=warmup.execute,
        outputs=_SAVED,
        settings=("warmup", *_PROMPTS),
        needs=_needs("pairs"),
        keys=_seeds,
        files=_files("warmup.reference"),
    ),
    "locate": Stage(
        number=5,
        execute=locate.execute,
        outputs=("*.safetensors", "counts.json"),
        # Of `warmup` what a warm-up would be: its steps and learning rates, which `linear` follows.
        settings=("locate", "warmup", "forget.ratio", "learn.ratio", "method", "protocol", *_MODEL),
        needs=_locate_needs,
        keys=_seeds,
        files=_files("locate.after", "warmup.reference"),
    ),
    "rewards": Stage(
        number=6,
        execute=rewards.execute,
        outputs=("rewards.jsonl",),
        copies=("rewrites.jsonl", *_LOCATING),
        settings=("rewards", "model.rounding", *_LOCATED, *_PROMPTS),
        needs=_needs("sample", "pairs"),
        keys=_seeds,
        files=_files("rewards.path", "rewards.model"),
    ),
    "forget": Stage(
        number=7,
        execute=forget.execute,
        outputs=("delta.safetensors",),
        copies=_SAVED,
        settings=("forget", "protocol", "model.rounding", *_PROMPTS),
        needs=_needs("sample", "locate", "rewards"),
        keys=_seeds,
        files=_files("forget.reference"),
    ),
    "learn": Stage(
        number=8,
        execute=learn.execute,
        outputs=("delta.safetensors",),
        copies=_SAVED,
        settings=("learn", "protocol", "model.rounding", *_PROMPTS),
        needs=_learn_needs,
        keys=_seeds,
        files=_files("learn.reference"),
    ),
    "evaluate": Stage(
        number=9,
        execute=evaluate.execute,
        outputs=("predictions.jsonl", "samples.jsonl", "texts.jsonl", *_RENDERED),
        settings=("evaluate", "sample.stop", "data.test", "data.test_size", "data.text", *_DATA),
        needs=_evaluate_needs,
        keys=_evaluated,
        files=_files("data.test", "data.text", "data.scorer"),
    ),
}


def inputs_of(config: Config) -> dict[str, str]:
    """What every rank of a run must have alike, by name: the settings, the software, and each input file.

    Of a file its SHA-256; above 64 MiB the size and both ends: 64 ranks reading 140 GB each would take too long.
    """
    files = {
        f"{key}: {name if len(files) > 1 else path.name}": path
        for stage in STAGES.values()
        for key, files in stage.files(config).items()
        for name, path in files.items()
    }
    return {
        "configuration": config.model_dump_json(),
        "software": str(versions()),
        **{name: _told_apart(path) for name, path in sorted(files.items())},
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
        "pretrain": config.model.name_or_path is None,
        "sft": config.sft is not None,
        "warmup": config.warms_up,
        "locate": sparse,
        "rewards": allo,
        "forget": allo,
        "learn": sparse,
    }
    return [name for name in STAGES if runs.get(name, True)]
