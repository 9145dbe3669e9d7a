"""Token rewards by rewriting: how likely a model that corrects a response keeps each of its tokens.

    p_t = p_RM(y_t | rewriting prompt(problem, gold solution, response), y_<t)

rewriter: learns from mined corrections: for each wrong response, the correct response to the same problem at the
smallest edit distance. It trains `rewards.ratio` of the weights, located by `linear` with its own objective; at 1 all.
prompted: the base itself, which is trained for nothing.
"""

import random
from array import array
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from allo_fast.config import UserError
from allo_fast.data.corpus import Corpus
from allo_fast.data.prompts import Prompts
from allo_fast.data.sources import UnusableRow
from allo_fast.method.objectives import Sft
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import Rows, rendered_once
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import train, trainer_of
from allo_fast.stages.gradients import located_policy
from allo_fast.stages.models import base_path, inference, prompts_of
from allo_fast.stages.problems import limits
from allo_fast.stages.responses import rewarded
from allo_fast.training.reference import Opened


def rewriter(unit: Unit, responses: Rows) -> Generator[Progress, None, dict]:
    settings, path = unit.config.rewards, unit.config.rewards.model or base_path(unit)
    readable = _rewrites(unit, responses, path)
    corpus = _corrections(_drawn(readable, settings.max_examples, unit.seed), unit.folder)
    policy, locating = yield from located_policy(unit, path, corpus, Sft(), settings.train, settings.ratio)
    trainer = trainer_of(unit, policy, corpus, Sft(), settings.train)
    facts = yield from train(unit, trainer)
    scoring = Opened(lambda batch: policy.response_logps(batch).exp(), policy.logps.layout, policy.model.device)
    yield from rewarded(unit, readable, scoring, "rewrite_ids")
    trainer.backend.close()
    return {**facts, **locating}


def prompted(unit: Unit, responses: Rows) -> Generator[Progress, None, dict]:
    path = unit.config.rewards.model or base_path(unit)
    readable = _rewrites(unit, responses, path)
    with inference(unit, path, scoring=True) as frozen:
        scoring = Opened(lambda batch: frozen.compute(batch).exp(), frozen.layout, frozen.model.device)
        yield from rewarded(unit, readable, scoring, "rewrite_ids")
    return {}


def _rewrites(unit: Unit, responses: Iterable[dict], path: str | Path) -> Rows:
    """Each with the tokens of its rewriting prompt; those whose prompt the model cannot read are left out.

    Raises UserError where none is left.
    """
    prompts = prompts_of(unit.config, load_tokenizer(base_path(unit)))
    positions = limits(unit.config, 0, path).positions
    rewrites = rendered_once(unit, "rewrites.jsonl", lambda: _rendered(responses, prompts))
    lengths = array("i", map(_length, rewrites))
    readable = rewrites.only([number for number, length in enumerate(lengths) if length <= positions])
    if not readable:
        shortest = min(lengths, default="no")
        raise UserError(
            f"rewards: the shortest rewriting prompt with its response has {shortest} tokens, {path} reads {positions}"
        )
    return readable


def _rendered(responses: Iterable[dict], prompts: Prompts) -> Iterator[dict]:
    for row in responses:
        with suppress(UnusableRow):  # counted by the stage
            ids = prompts.encode_rewrite(row["prompt"], row["solution"], row["response"])
            yield {**row, "rewrite_ids": ids}


def _length(row: dict) -> int:
    """Tokens of the rewriting prompt with the longest response that may follow it."""
    return len(row["rewrite_ids"]) + max(map(len, (*row["correct"], row["response_ids"])))


def _drawn(rows: Rows, limit: int | None, seed: int) -> Rows:
    return rows if limit is None else rows.only(random.Random(seed).sample(range(len(rows)), min(limit, len(rows))))


def _corrections(rows: Iterable[dict], folder: Path | None = None) -> Corpus:
    """Rewriting prompt -> the correct response nearest to the wrong one. folder: where it lies; None: in memory."""
    corpus = Corpus.on_disk(folder) if folder else Corpus()
    for row in rows:
        nearest = min(row["correct"], key=lambda ids: Levenshtein.distance(ids, row["response_ids"]))
        corpus.examples.append(tuple(corpus.add(row["rewrite_ids"], [nearest], row["id"])))
    return corpus
