"""The stages in order: pretrain, sample, pairs, warmup, locate, rewards, forget, learn, evaluate.

Each reads files and writes files; what it needs, and which settings it depends on, stands in this table alone.
"""

from allo_fast.config import Config, UserError
from allo_fast.runs import Stage
from allo_fast.stages import evaluate, forget, learn, locate, pairs, pretrain, rewards, sample, warmup


def _seeds(config: Config) -> list[str]:
    return [f"seed-{seed}" for seed in config.seeds]


def _data_files(*sources: str | None) -> list[str]:
    return [source.partition("[")[0] for source in sources if source]


def _needs(*names: str):
    """Units of the same seed; the base model is there for all of them, pretrained here or given."""

    def needs(config: Config, key: str) -> list[tuple[str, str]]:
        base = [] if config.model.name_or_path else [("pretrain", "base")]
        return base + [(name, key) for name in names]

    return needs


def _evaluated(config: Config) -> list[str]:
    methods = ["dpo", "allo"] if config.method == "allo" else ["dpo"]
    return ["base", *(f"{method}-{seed}" for method in methods for seed in _seeds(config))]


def _evaluate_needs(config: Config, key: str) -> list[tuple[str, str]]:
    method, _, seed = key.partition("-")
    producer = {"base": [], "dpo": ["warmup"], "allo": ["learn"]}[method]
    return _needs(*producer)(config, seed)


_MODEL = ("model",)

STAGES = {
    "pretrain": Stage(
        0,
        pretrain.run,
        ("pretrain",),
        lambda config, key: [],
        lambda config: [] if config.model.name_or_path else ["base"],
    ),
    "sample": Stage(
        1, sample.run, ("model", "data", "sample"), _needs(), _seeds, lambda config: _data_files(config.data.train)
    ),
    "pairs": Stage(2, pairs.run, ("data", "pairs"), _needs("sample"), _seeds),
    "warmup": Stage(3, warmup.run, ("model", "data", "warmup"), _needs("pairs"), _seeds),
    "locate": Stage(4, locate.run, ("model", "locate", "forget", "learn", "protocol"), _needs("warmup"), _seeds),
    "rewards": Stage(
        5,
        rewards.run,
        ("model", "data", "rewards"),
        _needs("sample", "pairs"),
        _seeds,
        lambda config: _data_files(config.rewards.path),
    ),
    "forget": Stage(
        6, forget.run, ("model", "data", "forget", "protocol"), _needs("pairs", "locate", "rewards"), _seeds
    ),
    "learn": Stage(7, learn.run, ("model", "data", "learn", "protocol"), _needs("pairs", "locate", "forget"), _seeds),
    "evaluate": Stage(
        8,
        evaluate.run,
        ("model", "data", "evaluate"),
        _evaluate_needs,
        _evaluated,
        lambda config: _data_files(config.data.test),
    ),
}


def stages_of(config: Config) -> list[str]:
    """The stages of a run, in order."""
    dense = ["pretrain", "sample", "pairs", "warmup", "evaluate"]
    return [name for name in STAGES if config.method == "allo" or name in dense]


__all__ = ["STAGES", "UserError", "stages_of"]
