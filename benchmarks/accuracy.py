"""How good models are by what their weights were located with, each score at its own learning rate.

A learning rate, of forgetting and learning alike, is chosen for each score on other problems than those that are
reported, with as many seeds as `TRIED`; then all seeds of the job are run with it. Differences are paired by problem.
The run is NAME-accuracy.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from allo_fast.__main__ import main
from allo_fast.config import Config
from allo_fast.config_file import load_config
from allo_fast.data.scoring import accuracy_interval, difference_interval
from allo_fast.durable import versions
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES
from allo_fast.stages.evaluate import PREDICTIONS

TRIED = 2
Right = list[list[float]]  # per seed, was each problem answered right


@dataclass(frozen=True)
class Row:
    score: str
    learning_rate: float
    tried: dict[float, float]  # accuracy on the development problems, by learning rate
    accuracy: float
    ci95: tuple[float, float]
    seeds: list[float]
    minus: dict[str, tuple[float, tuple[float, float]]]  # difference to another model and its interval


def run(
    path: Path, overrides: list[str], scores: list[str], rates: list[float], development: str, out: Path | None
) -> list[Row]:
    """Prints a table; writes JSON when `out` is given."""
    config, right, chosen = load_config(path, overrides), {}, {}
    if config.data.format == "preference":
        raise SystemExit("data.format: preference has no right answers to count")
    if config.method == "dpo":
        raise SystemExit("method: dpo locates nothing")
    overrides = [*overrides, f"name={config.name}-accuracy"]  # the job's own run stays as it is
    seeds = f"seeds={config.seeds[:TRIED]}"
    for score in scores:
        tried = {}
        for rate in rates:
            at_rate, _ = _answers(path, [*overrides, seeds, f"data.test={development}"], score, rate)
            tried[rate] = fmean(map(fmean, at_rate))
            print(f"{score} at {rate:g}: {tried[rate]:.3f} of {len(at_rate[0])} development problems", flush=True)
        best = max(tried, key=tried.get)
        right[score], right["base"] = _answers(path, overrides, score, best)
        chosen[score] = best, tried
    rows = []
    against = ["base", *(name for name in ("random",) if name in right)]
    print(
        f"{'score':<10}{'rate':>8}{'accuracy':>10}{'95 % interval':>18}" + "".join(f"{f'- {n}':>28}" for n in against)
    )
    for score, (rate, tried) in chosen.items():
        accuracy, interval = accuracy_interval(right[score])
        minus = {name: difference_interval(right[score], right[name]) for name in against if name != score}
        rows.append(Row(score, rate, tried, accuracy, interval, [*map(fmean, right[score])], minus))
        _print(rows[-1], against)
    if out:
        facts = {"config": config.model_dump(), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
        base = fmean(right["base"][0])
        facts |= {"development": development, "base": base, "rows": [*map(asdict, rows)]}
        out.write_text(json.dumps(facts, indent=1))
    return rows


def _answers(path: Path, overrides: list[str], score: str, rate: float) -> tuple[Right, Right]:
    """Of the job's method, and of the base."""
    located = ["locate.last=true"] if score == "last" else [f"locate.score={score}"]
    words = [*overrides, *located, "rivals=[]", f"forget.learning_rate={rate}", f"learn.learning_rate={rate}"]
    if main(["run", str(path), *words, "--rerun"]):
        raise SystemExit(f"{score} failed")
    config = load_config(path, words)
    owner = Run(config, STAGES)
    return [_right(owner, config, f"{config.method}-seed-{s}") for s in config.seeds], [_right(owner, config, "base")]


def _right(owner: Run, config: Config, key: str) -> list[float]:
    rows = read_jsonl(Unit(owner, "evaluate", key).folder / PREDICTIONS)
    return [float(row[config.data.scorer]) for row in rows]


def _print(row: Row, against: list[str]) -> None:
    low, high = row.ci95
    minus = ""
    for name in against:
        if name in row.minus:
            points, (least, most) = row.minus[name]
            minus += f"{f'{points:+.1%} ({least:+.1%} .. {most:+.1%})':>28}"
    interval = f"{low:.1%} .. {high:.1%}"
    print(f"{row.score:<10}{row.learning_rate:>8g}{row.accuracy:>10.1%}{interval:>18}{minus}", flush=True)
