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
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from allo_fast import ranks
from allo_fast.config import GRADIENT_SCORES, Config, UserError
from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.durable import write_bytes
from allo_fast.method.rows import row_lengths
from allo_fast.method.scores import Given, Random, Score
from allo_fast.method.selection import Selection, changes
from allo_fast.model.loading import load_model
from allo_fast.model.weights import fingerprint, named_weights, size_of
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import objective_of
from allo_fast.stages.gradients import frozen_base, gradient_scores
from allo_fast.stages.models import base_path
from allo_fast.stages.pairs import PAIRS


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    config, path, facts = unit.config, base_path(unit), {}
    if config.located_by in GRADIENT_SCORES:
        scored, facts = yield from _by_gradients(unit, path)
    else:
        scored = _without_gradients(unit, path)
    sizes = {name: score.numel() for name, score in scored.scores.items()}
    counts = {}
    for done, (stage, ratio) in enumerate(ratios(config).items(), start=1):
        selection = select(config, scored, ratio)
        ranks.on_main(partial(selection.save, unit.folder / f"{stage}.safetensors"))
        counts[stage] = {name: [len(selection.positions(name)), size] for name, size in sizes.items()}
        facts |= {f"{stage}_selected": selection.selected, f"{stage}_sha256": selection.sha256()}
        yield Progress(done, len(ratios(config)), "selection")
    ranks.on_main(lambda: write_bytes(unit.folder / "counts.json", json.dumps(counts, indent=1).encode()))
    return {"parameters": sum(sizes.values()), "score": config.located_by, **facts}


def ratios(config: Config) -> dict[str, float]:
    """Of each stage that trains what is selected."""
    learn = {"learn": config.learn.ratio}
    return {"forget": config.forget.ratio, **learn} if config.method == "allo" else learn


@dataclass(frozen=True)
class Scored:
    """scores: by tensor. base: fingerprint of the model. row_lengths: entries of a row, by tensor."""

    scores: Mapping[str, Score]
    base: str
    row_lengths: dict[str, int]


def select(config: Config, scored: Scored, ratio: float) -> Selection:
    settings = config.locate
    return Selection.from_scores(
        scored.scores,
        ratio,
        base=scored.base,
        exclude=tuple(settings.exclude),
        skip=settings.skip,
        last=settings.last,
        scope=settings.scope,
        rows=scored.row_lengths if settings.rows else None,
        protocol=config.protocol,
    )


def _without_gradients(unit: Unit, path: str | Path) -> Scored:
    config, sharded = unit.config, unit.zero is not None and unit.zero.sharded
    base = load_model(path, config.model, sharded=sharded)
    mark, lengths, weights = fingerprint(base), row_lengths(base), named_weights(base)
    if config.located_by == "magnitude":
        scores = {name: Given(weight) for name, weight in weights.items()}
    elif config.located_by == "random":
        scores = {name: Random(name, size_of(weight), unit.seed) for name, weight in weights.items()}
    else:
        scores = _changes(unit, base, path, sharded)
    return Scored(scores, mark, lengths)


def _changes(unit: Unit, base: PreTrainedModel, path: str | Path, sharded: bool) -> dict[str, Score]:
    """By the warm-up, of what it started from: the base in the job's dtype. By a model of the user's, in float32."""
    settings, after = unit.config.model, unit.config.locate.after
    if after:
        base = load_model(path, settings, dtype="float32", sharded=sharded)
    other = after or unit.needed("warmup") / "model"
    try:
        return changes(base, load_model(other, settings, dtype="float32", sharded=sharded))
    except UserError as error:
        raise UserError(f"{other}: {error}") from None
    except ValueError as error:
        raise UserError(f"locate.after: {other}: {error}") from None


def _by_gradients(unit: Unit, path: str | Path) -> Generator[Progress, None, tuple[Scored, dict]]:
    """The scores, and what the manifest says of them."""
    settings = unit.config.warmup
    corpus = corpus_of_pairs(read_jsonl(unit.needed("pairs") / PAIRS), unit.folder)
    with frozen_base(unit, path) as base:
        lengths = row_lengths(base.logps.model)
        scores, facts = yield from gradient_scores(
            unit, base, corpus, objective_of(settings), settings, unit.config.located_by, settings.reference
        )
    return Scored(scores, base.fingerprint, lengths), facts
