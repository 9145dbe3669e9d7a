"""Driving a training loop as progress, and the facts that every training stage records."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from transformers import PreTrainedModel

from allo_fast import ranks
from allo_fast.config import ModelConfig, TrainConfig, UserError
from allo_fast.config_train import LossConfig
from allo_fast.data.corpus import Corpus
from allo_fast.data.encoding import corpus_of_pairs, max_positions
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Npo, Preference, Sft
from allo_fast.method.policy import SparsePolicy
from allo_fast.plan import costs
from allo_fast.plan.shapes import weights_of
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.models import frozen_reference
from allo_fast.stages.pairs import EVAL_PAIRS
from allo_fast.training.engine import Trainer
from allo_fast.training.examples import Examples
from allo_fast.training.held_out import HeldOut
from allo_fast.training.metrics import LOG, StepMetrics
from allo_fast.training.reference import Reference
from allo_fast.training.tracking import tracking


def objective_of(settings: LossConfig, epsilon: float | None = None, protocol: str = "paper") -> Preference:
    """epsilon: the fraction of rejected tokens that are key; None: all."""
    return Preference(
        settings.beta,
        epsilon,
        settings.label_smoothing,
        protocol,
        settings.losses,
        settings.simpo_gamma,
        settings.length_alpha,
    )


def trainer_of(
    unit: Unit,
    policy: DensePolicy | SparsePolicy,
    corpus: Corpus,
    objective: Sft | Npo | Preference,
    settings: TrainConfig,
    **more,
) -> Trainer:
    """As a stage trains; more: see `Trainer`."""
    if isinstance(settings, LossConfig):
        more["held_out"] = held_out_of(unit, policy, objective, settings)
    named = frozen_reference(unit, getattr(settings, "reference", None) if objective.needs_reference else None)
    given = {"mark": unit.mark, "seed": unit.seed, "zero": unit.zero, "reference": named, **more}
    online = unit.config.reference == "online"
    return Trainer(policy, corpus, objective, settings, unit.folder, cache=cache_of(unit), online=online, **given)


def held_out_of(
    unit: Unit, policy: DensePolicy | SparsePolicy, objective: Preference, settings: LossConfig
) -> HeldOut | None:
    """The pairs that `pairs.eval_size` kept from training, if any."""
    if not unit.config.pairs.eval_size:
        return None
    corpus = corpus_of_pairs(read_jsonl(unit.needed("pairs") / EVAL_PAIRS))
    sparse = policy if isinstance(policy, SparsePolicy) else None
    watched = settings.eval_steps, settings.early_stopping_patience, settings.load_best_model_at_end
    return HeldOut(Examples(corpus, settings, unit.seed), objective, *watched, sparse)


def cache_of(unit: Unit) -> Path:
    """Of what stages share, and could compute again."""
    return unit.owner.home.cache


def train(unit: Unit, trainer: Trainer) -> Generator[Progress, None, dict]:
    """Drives a training loop; returns the facts every training stage records."""
    check_lengths(trainer.policy.model, trainer.corpus)
    if trainer.held_out:
        check_lengths(trainer.policy.model, trainer.held_out.examples.corpus)
    yield from responses_done(trainer.prepare())
    with _tracked(unit) as record:
        for metrics in trainer.run():
            record(metrics)
            notes = {"loss": metrics.loss, **metrics.metrics}
            yield Progress(metrics.step, metrics.total_steps, "step", notes)
    rows = ranks.on_main(lambda: read_jsonl(unit.folder / LOG))  # of earlier sessions too
    parameters, seconds = trainer.policy.parameters, sum(row["seconds"] for row in rows)
    facts = {
        "parameters": parameters,
        "examples": len(trainer.examples),
        "steps": trainer.made,
    }
    if trainer.made < len(trainer.steps):
        facts["ended_before_steps"] = len(trainer.steps)
    if seconds:  # else the log of all steps was lost
        facts["tokens_per_second"] = sum(row["tokens"] for row in rows) / seconds
    if trainer.held_out and trainer.held_out.keeps_best:
        facts["best_step"] = trainer.held_out.best_step
    if trainer.examples.set_aside:
        facts["set_aside"] = trainer.examples.set_aside
    if trainer.skipped:
        facts["skipped_steps"] = trainer.skipped
    total = sum(trainer.state_bytes().values())
    facts |= {"state_bytes": trainer.state_bytes(), "state_bytes_per_parameter": total / parameters}
    if unit.zero:
        facts |= _of_ranks(unit, trainer)
    if isinstance(trainer.policy, SparsePolicy):
        facts["selected"] = trainer.policy.selected
        facts["changed"] = trainer.policy.changed()
    return facts


def _tracked(unit: Unit) -> AbstractContextManager[Callable[[StepMetrics], None]]:
    """By rank 0, as `report_to` says."""
    if unit.config.report_to == "none" or not ranks.is_main():
        return nullcontext(lambda metrics: None)
    name, config = f"{unit.name}-{unit.key}", unit.config.model_dump()
    return tracking(unit.config.report_to, unit.owner.home.folder, name, config)


def hidden_updates(model: ModelConfig, facts: dict) -> str | None:
    """What to tell whoever trained where rounding to nearest hid most of it; facts: of a stage's manifest.

    By chance few moves are no loss: in the mean they are as large as what was trained (docs/decisions.md has measured).
    """
    if facts.get("left_step") == 0:
        return None  # forgetting was taken back, which is said
    if facts.get("changed") == 0:
        return "none of the selected weights moved: their gradients are zero, or far below the weights' rounding"
    if model.dtype != "bfloat16" or model.rounding != "nearest" or "changed" not in facts:
        return None
    share = facts["changed"] / facts["selected"]
    if share >= 0.5:
        return None
    return (
        f"only {share:.1%} of the selected weights moved: the updates of the others are below bfloat16's rounding. "
        "A larger learning rate moves more of them; model.rounding=stochastic or model.dtype=float32 lets all count"
    )


def responses_done(
    work: Generator[tuple[int, int], None, Reference | None],
) -> Generator[Progress, None, Reference | None]:
    """As progress."""
    while True:
        try:
            yield Progress(*next(work), "reference response")
        except StopIteration as end:
            return end.value


def _of_ranks(unit: Unit, trainer: Trainer) -> dict:
    """How the stage was divided, and what a rank handed to collectives in its last step: counted, and planned.

    Nothing was counted where an earlier session, perhaps without ranks, made every step; a stage of one step counts
    DeepSpeed's first, in which ZeRO-3 learns the order of modules and gathers more.
    """
    policy, zero, world = trainer.policy, unit.zero, ranks.world_size()
    ratio = policy.selected / policy.parameters if isinstance(policy, SparsePolicy) else None
    micros = trainer.config.gradient_accumulation_steps
    weights = weights_of(policy.model.config, unit.config.model.dtype)
    planned = [
        sum(costs.traffic(weights, unit.config.model, micros, share, zero, world).values()) for share in (ratio, None)
    ]
    return {
        "world_size": world,
        "zero_stage": zero.stage,
        "traffic_bytes_per_step": sum(trainer.traffic_by_operation.values()),
        "planned_traffic_bytes_per_step": planned[0],
        "planned_dense_traffic_bytes_per_step": planned[1],
        "traffic_by_operation": trainer.traffic_by_operation,
    }


def check_lengths(model: PreTrainedModel, corpus: Corpus) -> None:
    """Raises UserError when a prompt with its response is longer than the model can read."""
    if (longest := corpus.longest) > (positions := max_positions(model.config.get_text_config())):
        raise UserError(
            f"a prompt with its response has {longest} tokens, the model reads {positions}; lower "
            "data.max_prompt_tokens, data.max_response_tokens or sample.max_new_tokens"
        )
