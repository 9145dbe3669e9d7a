"""The key neurons: the weights that preference data moves most, found at the frozen base.

    score_i, see locating/families.py; the top floor(ratio x N) over the whole model
    `allo-fast locate CONFIG`

Departs from the paper, which trains all weights for an epoch (the warm-up) to see which move: `linear` is what that
epoch would move to first order, without a weight being written. `locate.score: delta` measures the warm-up itself, and
`locate.after` what any other training changed. Departs from the release: exact, counted once for tied weights, and
measured from the values that the optimizer started from. Each sparse stage has a ratio of its own. Writes
forget.safetensors, learn.safetensors and counts.json.
"""

import json
import random
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from allo_fast import ranks
from allo_fast.config import GRADIENT_SCORES, Config, TrainConfig, UserError
from allo_fast.data.batch import Batch
from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.locating.files import StoredScore, stored_scores
from allo_fast.locating.sweep import Sweep
from allo_fast.method.objectives import Dpo, Sft
from allo_fast.method.scores import Given, Random, Score
from allo_fast.method.selection import Selection, changes
from allo_fast.model.loading import load_model
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import fingerprint, named_weights, size_of
from allo_fast.plan.windows import windows
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import SCRATCH, Progress, Unit
from allo_fast.stages.models import base_path, frozen_reference
from allo_fast.training.examples import Examples, reference_logps


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    config, path = unit.config, base_path(unit)
    if config.located_by in GRADIENT_SCORES:
        scores, base, facts = yield from _by_gradients(unit, path)
    else:
        scores, base = _without_gradients(unit, path)
        facts = {}
    sizes = {name: score.numel() for name, score in scores.items()}
    counts = {}
    for done, (stage, ratio) in enumerate(ratios(config).items(), start=1):
        selection = select(config, scores, ratio, base)
        if ranks.is_main():
            selection.save(unit.folder / f"{stage}.safetensors")
        counts[stage] = {name: [len(selection.positions(name)), size] for name, size in sizes.items()}
        facts |= {f"{stage}_selected": selection.selected, f"{stage}_sha256": selection.sha256()}
        yield Progress(done, len(ratios(config)), "selection")
    if ranks.is_main():
        (unit.folder / "counts.json").write_text(json.dumps(counts, indent=1))
    return {"parameters": sum(sizes.values()), "score": config.located_by, **facts}


def ratios(config: Config) -> dict[str, float]:
    """Of each stage that trains what is selected."""
    learn = {"learn": config.learn.ratio}
    return {"forget": config.forget.ratio, **learn} if config.method == "allo" else learn


def select(config: Config, scores: Mapping[str, Score], ratio: float, base: str) -> Selection:
    settings = config.locate
    return Selection.from_scores(
        scores,
        ratio,
        base=base,
        exclude=tuple(settings.exclude),
        skip=settings.skip,
        last=settings.last,
        scope=settings.scope,
        protocol=config.protocol,
    )


def _without_gradients(unit: Unit, path: str | Path) -> tuple[Mapping[str, Score], str]:
    """The scores, and the fingerprint of the base."""
    config, sharded = unit.config, unit.zero is not None and unit.zero.sharded
    base = load_model(path, config.model, sharded=sharded)
    weights = named_weights(base)
    if config.located_by == "magnitude":
        return {name: Given(weight) for name, weight in weights.items()}, fingerprint(base)
    if config.located_by == "random":
        drawn = {name: Random(name, size_of(weight), unit.seed) for name, weight in weights.items()}
        return drawn, fingerprint(base)
    other = config.locate.after or unit.needed("warmup") / "model"
    after = load_model(other, config.model, dtype="float32", sharded=sharded)
    try:
        return changes(base, after), fingerprint(base)
    except ValueError as error:
        raise UserError(f"locate.after: {other}: {error}") from None


def _by_gradients(unit: Unit, path: str | Path) -> Generator[Progress, None, tuple[dict[str, StoredScore], str, dict]]:
    config, settings = unit.config, unit.config.warmup
    rows = _drawn(read_jsonl(unit.needed("pairs") / "pairs.jsonl"), config, unit.seed)
    with frozen_base(unit, path) as base:
        examples = Examples(corpus_of_pairs(rows), settings, unit.seed)
        reference = yield from _reference(unit, examples, base.logps)
        scores, facts = yield from gradient_scores(
            unit, base, examples, Dpo(settings.beta), settings, config.located_by, reference
        )
    return scores, base.fingerprint, facts


def gradient_scores(
    unit: Unit,
    base: "FrozenBase",
    examples: Examples,
    objective: Sft | Dpo,
    train: TrainConfig,
    score: str,
    reference: Mapping[str, Tensor] | None = None,
) -> Generator[Progress, None, tuple[dict[str, StoredScore], dict]]:
    """Scores of all weights, in files that the unit keeps until it is complete; and what its manifest says of them."""
    sizes = {name: size_of(weight) for name, weight in named_weights(base.logps.model).items()}
    total = sum(sizes.values())
    sweep = Sweep(
        base.logps,
        examples,
        objective,
        train,
        score,
        unit.folder / SCRATCH,
        windows=windows(unit.config.locate, score, total, None, ranks.world_size()),
        clip=unit.config.locate.clip,
        host=unit.config.locate.accumulators == "host",
        compute=base.compute,
        reference=reference,
    )
    for done, steps in sweep.run():
        yield Progress(done, steps, f"step of {sweep.passes} passes")
    states = sum(sweep.state_bytes.values())
    facts = {"examples": len(examples.corpus.examples), "steps": len(examples.steps), "windows": len(sweep.windows)}
    facts |= {"passes": sweep.passes, "state_bytes": sweep.state_bytes, "state_bytes_per_parameter": states / total}
    return stored_scores(unit.folder / SCRATCH, sizes), facts


@dataclass(frozen=True)
class FrozenBase:
    """compute: its response log-probabilities, with a graph for backward."""

    logps: ResponseLogps
    compute: Callable[[Batch], Tensor]
    fingerprint: str


@contextmanager
def frozen_base(unit: Unit, path: str | Path) -> Iterator[FrozenBase]:
    """The model at `path` with nothing to train."""
    sharded = unit.zero is not None and unit.zero.sharded
    model = load_model(path, unit.config.model, sharded=sharded).requires_grad_(False)
    base, logps = fingerprint(model), ResponseLogps(model)
    if not sharded:
        yield FrozenBase(logps, logps, base)
        return
    from allo_fast.training.backend_deepspeed import differentiable, frozen_engine

    with frozen_engine(logps) as engine:
        yield FrozenBase(logps, differentiable(engine), base)


def _drawn(pairs: list[dict], config: Config, seed: int) -> list[dict]:
    """`locate.pairs` of them, in their order. Raises UserError for fewer than an optimizer step has."""
    count, train = config.locate.pairs, config.warmup
    if count is None or count >= len(pairs):
        return pairs
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if count < per_step:
        raise UserError(f"locate.pairs: expected at least the {per_step} of one step of warmup, got {count}")
    return [pairs[index] for index in sorted(random.Random(seed).sample(range(len(pairs)), count))]


def _reference(
    unit: Unit, examples: Examples, logps: ResponseLogps
) -> Generator[Progress, None, Mapping[str, Tensor] | None]:
    """Of another reference model than the base, where the warm-up names one."""
    opened = frozen_reference(unit, unit.config.warmup.reference)
    if opened is None:
        return None
    path, share, device = unit.folder / "reference_logps.safetensors", logps.share_prompts, logps.model.device
    return (yield from _batches(reference_logps(path, examples, opened(share), share, device)))


def _batches(work: Generator[tuple[int, int], None, dict]) -> Generator[Progress, None, dict]:
    while True:
        try:
            yield Progress(*next(work), "reference batch")
        except StopIteration as end:
            return end.value
