"""On-policy training: each round samples, judges, locates, forgets and learns anew, from the model of the one before.

A later round is a run for each seed, NAME-round-2-seed-0, whose base is the model that was made; and its reference,
where the configuration names no other.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np

from allo_fast import ranks
from allo_fast.compare.results import mean_reward, values_of
from allo_fast.data.intervals import accuracy_interval, difference_interval
from allo_fast.durable import write_bytes
from allo_fast.report.summary import percent, shown_interval
from allo_fast.runs.home import MANIFEST, ROUNDS
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages.export import save_made


def later_rounds(first: Run, making: bool = True) -> Iterator[list[Run]]:
    """Of rounds 2, 3, ... a run for every seed. making: asked for once those before are complete, whose models are made
    where they lack.
    """
    before = {seed: first for seed in first.config.seeds}
    for number in range(2, first.config.rounds + 1):
        for seed, run in before.items() if making else ():
            _ensure_model(_maker(run, seed))
        before = {seed: _round(first, number, seed, run) for seed, run in before.items()}
        yield [*before.values()]


def complete_rounds(first: Run) -> list[list[Run]]:
    """Of the rounds after the first, those of which everything is there."""

    def are_complete(runs: list[Run]) -> bool:
        return all((unit.folder / MANIFEST).exists() for run in runs for unit in run.units(["evaluate"]))

    return [*takewhile(are_complete, later_rounds(first, making=False))]


def _maker(run: Run, seed: int) -> Unit:
    """Of the model that the next round begins from."""
    return Unit(run, "warmup" if run.config.method == "dpo" else "learn", f"seed-{seed}")


def _round(first: Run, number: int, seed: int, before: Run) -> Run:
    config = first.config
    model = config.model.model_copy(update={"name_or_path": str(_maker(before, seed).folder / "model")})
    own = {"name": f"{config.name}-round-{number}-seed-{seed}", "seeds": [seed], "model": model}
    config = config.model_copy(update={**own, "rounds": 1, "sft": None, "rivals": []})
    return Run(config, first.stages, folder=Path(config.output_dir) / config.name)


def _ensure_model(maker: Unit) -> None:
    """Of its delta, where somebody removed the model, which nothing else reads, or had none saved."""
    out = maker.folder / "model"
    if ranks.on_main(lambda: (maker.folder / MANIFEST).exists() and not out.exists()):
        save_made(maker, out)


def said_of_rounds(first: Run, later: Sequence[Sequence[Run]]) -> list[str]:
    """Of each round, how good its models are, and how much better than those before, which are its base; writes
    rounds.json. By a reward model each round's wins are over the responses of the one before."""
    lines, rows = [], []
    for number, runs in enumerate([[first], *later], start=1):
        metric = values_of(runs[0])[0]
        numbers = np.concatenate([values_of(run)[1] for run in runs])
        before = np.concatenate([values_of(run, "base")[1] for run in runs])
        score, interval = accuracy_interval(numbers.tolist())
        points, gained = difference_interval(numbers.tolist(), before.tolist())
        since = "base" if number == 1 else f"round {number - 1}"
        low, high = (percent(bound, "+") for bound in gained)
        shown = f"{percent(score)} ({shown_interval(metric, interval)})"
        if metric == "wins":
            shown += f", mean reward {mean_reward(runs):.4g}"
        lines.append(f"round {number}: {metric} {shown}, {percent(points, '+')} ({low} .. {high}) since {since}")
        rows.append({"round": number, metric: score, "ci95": interval, "gain": {"points": points, "ci95": gained}})
    write_bytes(first.folder / ROUNDS, json.dumps(rows, indent=1).encode())
    return lines
