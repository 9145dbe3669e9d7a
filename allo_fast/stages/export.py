"""The model of a stage as a normal Hugging Face folder. `allo-fast export RUN STAGE OUT [--seed S]`

Pretraining and dense stages left a model, which is loaded in the run's dtype; sparse ones a delta of their base.
"""

from pathlib import Path

from allo_fast import ranks
from allo_fast.config import Config, ModelConfig, UserError
from allo_fast.model.loading import load_tokenizer
from allo_fast.model.saving import check_new, save_model
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import stages_of
from allo_fast.stages.models import load_made, made_in, tokenizer_of

STAGES_WITH_MODELS = ("pretrain", "sft", "warmup", "forget", "learn")


def export(run: Run, stage: str, out: Path, seed: int | None = None) -> Unit:
    """The unit whose model it is. seed: None: the run's first.

    Raises UserError for what the run has not, or not whole; an `out` with something, or in the run itself.
    """
    check_new(out)
    if out.resolve().is_relative_to(run.folder.resolve()):
        raise UserError(f"{out}: inside the run; name a folder elsewhere")
    unit = Unit(run, stage, _key(run.config, run.folder, stage, seed))
    if wrong := unit.changed_settings() or unit.damage(copies=False):
        raise UserError(f"{unit.folder}: {wrong}; run `allo-fast {stage} CONFIG --rerun` first")
    save_made(unit, out)
    return unit


def save_made(unit: Unit, out: Path) -> None:
    """The model of a complete unit of `STAGES_WITH_MODELS`, by rank 0; every rank calls it together."""
    path, delta = made_in(unit, unit.folder)

    def save() -> None:
        model = load_made(path, delta, ModelConfig(device="cpu", dtype=unit.config.model.dtype))
        save_model(model, tokenizer_of(unit) if delta else load_tokenizer(path), out)

    ranks.on_main(save)


def _key(config: Config, folder: Path, stage: str, seed: int | None) -> str:
    """Of the unit that made the model."""
    if stage not in STAGES_WITH_MODELS:
        raise UserError(f"{stage}: not a stage that makes a model; those are {', '.join(STAGES_WITH_MODELS)}")
    if stage not in (stages := stages_of(config)):
        raise UserError(f"{folder}: has no {stage}; its stages are {', '.join(stages)}")
    if seed is not None and seed not in config.seeds:
        raise UserError(f"{folder}: has no seed {seed}; its seeds are {', '.join(map(str, config.seeds))}")
    return "base" if stage in ("pretrain", "sft") else f"seed-{config.seeds[0] if seed is None else seed}"
