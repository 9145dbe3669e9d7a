"""On-policy training: each round samples, judges, locates, forgets and learns anew, from the model of the one before.

A later round is a run for each seed, NAME-round-2-seed-0, whose base and reference is the model that was made.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from allo_fast.compare.intervals import difference
from allo_fast.compare.results import values_of
from allo_fast.config import Config
from allo_fast.data.scoring import accuracy_interval
from allo_fast.durable import write_bytes
from allo_fast.report.summary import percent
from allo_fast.runs.home import ROUNDS
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit


def later_rounds(first: Run) -> Iterator[list[Config]]:
    """Of rounds 2, 3, ... a run's configuration for every seed; those of a round once the one before is complete."""
    runs = {seed: first for seed in first.config.seeds}
    for number in range(2, first.config.rounds + 1):
        configs = {seed: _round(first.config, number, seed, run) for seed, run in runs.items()}
        yield [*configs.values()]
        runs = {seed: Run(config, first.stages) for seed, config in configs.items()}


def _round(config: Config, number: int, seed: int, before: Run) -> Config:
    maker = Unit(before, "warmup" if config.method == "dpo" else "learn", f"seed-{seed}")
    model = config.model.model_copy(update={"name_or_path": str(maker.folder / "model")})
    own = {"name": f"{config.name}-round-{number}-seed-{seed}", "seeds": [seed], "model": model}
    return config.model_copy(update={**own, "rounds": 1, "sft": None, "rivals": []})


def said_of_rounds(first: Run, later: list[list[Run]]) -> list[str]:
    """Of each round, how good its models are, and how much better than those before; writes rounds.json."""
    metric, base = values_of(first, "base")
    values = [base, values_of(first)[1]]
    values += [np.concatenate([values_of(run)[1] for run in runs]) for runs in later]
    lines, rows = [], []
    for number, (numbers, before) in enumerate(zip(values[1:], values, strict=False), start=1):
        score, interval = accuracy_interval(numbers.tolist())
        gain = difference(numbers, before)
        since = "base" if number == 1 else f"round {number - 1}"
        low, high = (f"{100 * bound:+.1f}" for bound in gain.interval)
        lines.append(
            f"round {number}: {metric} {percent(score)}, {100 * gain.points:+.1f} ({low} .. {high}) since {since}"
        )
        rows.append({"round": number, metric: score, "ci95": interval, "gain": asdict(gain)})
    write_bytes(first.folder / ROUNDS, json.dumps(rows, indent=1).encode())
    return lines
