"""What a comparison says: how good each arm is, and which differences are more than chance."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np

from allo_fast.compare import figures
from allo_fast.compare.arms import Comparison, Trial, Values, shown
from allo_fast.config import Config
from allo_fast.durable import versions, write_bytes
from allo_fast.report.summary import percent, preference_values
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, stages_of
from allo_fast.stages.evaluate import PREDICTIONS

_DRAWS, _AT_ONCE = 10_000, 500
Interval = tuple[float, float]
Tried = list[tuple[float, Values]]  # what each candidate got on development data


@dataclass(frozen=True)
class Difference:
    """In accuracy; interval: 95 %, paired by problem and seed."""

    points: float
    interval: Interval

    @property
    def verdict(self) -> str:
        low, high = self.interval
        return "clear of zero" if low > 0 or high < 0 else "inside the noise"


@dataclass(frozen=True)
class Result:
    """Of an arm, or of the base.

    chosen: on development data, with `tried`, what each candidate got there. edges: chosen keys of which no candidate
    was beyond the best. states: bytes per parameter, of the stage that learns (or forgets) with most. seconds: of a
    seed, in what the arm trains, locates and scores for itself.
    """

    name: str
    accuracy: float
    interval: Interval
    seeds: list[float]
    minus: dict[str, Difference]
    chosen: Values
    tried: Tried
    edges: list[str]
    states: float | None
    seconds: float | None
    ratio: float | None
    settings: Values


def values_of(run: Run, key: str | None = None) -> tuple[str, np.ndarray]:
    """The metric, and its numbers, fp64 [seeds, problems]; key: of the one unit that judges the base; None: the arm."""
    config = run.config
    keys = [key] if key else [f"{config.method}-seed-{seed}" for seed in config.seeds]
    rows = [read_jsonl(Unit(run, "evaluate", key).folder / PREDICTIONS) for key in keys]
    if config.data.format == "preference":
        metric = "logps/accuracies" if key else "rewards/accuracies"
        return metric, np.array(preference_values([*map(list, rows)], _beta(config))[0][metric])
    return "accuracy", np.array([[float(row[config.data.scorer]) for row in seed] for seed in rows])


def _beta(config: Config) -> float:
    return config.warmup.beta if config.method == "dpo" else config.learn.beta


def interval(values: np.ndarray, draws: int = _DRAWS) -> Interval:
    """95 % of the mean of values [S, P]: problems and seeds are drawn with replacement, both together.

    The pigeonhole bootstrap (Owen 2007, arXiv 0712.1111), of S - 1 seeds (Rao & Wu 1988, so that their variance is not
    too small), and of P problems; one seed stands for all.
    """
    seeds, problems = values.shape
    random, means = np.random.default_rng(0), []
    for _ in range(0, draws, _AT_ONCE):
        drawn = max(1, seeds - 1)
        of_seeds = random.multinomial(drawn, np.full(seeds, 1 / seeds), _AT_ONCE) / drawn
        of_problems = random.multinomial(problems, np.full(problems, 1 / problems), _AT_ONCE) / problems
        means.append(np.einsum("ds,sp,dp->d", of_seeds, values, of_problems, optimize=True))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()
    return low, high


def difference(better: np.ndarray, worse: np.ndarray) -> Difference:
    """Of [S, P] or, of a model without seeds, [1, P]."""
    paired = better - worse
    return Difference(float(paired.mean()), interval(paired))


def results(comparison: Comparison, finals: Sequence[tuple[Trial, Tried]]) -> tuple[str, list[Result]]:
    """The metric; of the base and every arm, which are complete; writes compare.json, compare.md and its figures."""
    runs = {trial.arm.name: Run(trial.config, STAGES, folder=trial.folder) for trial, _ in finals}
    values = {name: values_of(run)[1] for name, run in runs.items()}
    metric = values_of(next(iter(runs.values())))[0]
    if metric == "accuracy":
        values = {"base": values_of(next(iter(runs.values())), "base")[1]} | values
    against = [name for name in comparison.config.against if name in values]
    trials = {trial.arm.name: (trial, tried) for trial, tried in finals}
    rows = []
    for name, numbers in values.items():
        trial, tried = trials.get(name, (None, []))
        rows.append(
            Result(
                name,
                float(numbers.mean()),
                interval(numbers),
                numbers.mean(1).tolist(),
                {other: difference(numbers, values[other]) for other in against if other != name},
                trial.values if trial else {},
                tried,
                edges(trial.values, tried) if trial else [],
                *(_costs(runs[name]) if trial else (None, None, None)),
                trial.arm.settings if trial else {},
            )
        )
    _write(comparison, metric, rows, next(iter(values[name] for name in runs)).shape)
    return metric, rows


def edges(chosen: Values, tried: Tried) -> list[str]:
    """Chosen numbers at an end of what was tried: beyond it might be better ones."""
    found = []
    for key, value in chosen.items():
        numbers = sorted({float(values[key]) for _, values in tried if _is_number(values[key])})
        if len(numbers) > 1 and _is_number(value) and float(value) in (numbers[0], numbers[-1]):
            found.append(key)
    return found


def _is_number(value: object) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _costs(run: Run) -> tuple[float, float, float]:
    """State bytes per parameter, seconds of a seed, ratio of the weights that train in the end."""
    config = run.config
    own = [stage for stage in stages_of(config) if stage in ("warmup", "locate", "rewards", "forget", "learn")]
    manifests = {stage: [unit.manifest() for unit in run.units([stage])] for stage in own}
    trains = ["warmup"] if config.method == "dpo" else ["forget", "learn"]
    states = [m["facts"]["state_bytes_per_parameter"] for stage in trains for m in manifests.get(stage, [])]
    seconds = sum(fmean(m["seconds"] for m in of_stage) for of_stage in manifests.values())
    return max(states), seconds, 1.0 if config.method == "dpo" else config.learn.ratio


def table(rows: Sequence[Result], metric: str) -> str:
    """In Markdown."""
    others = sorted({other for row in rows for other in row.minus}, key=[row.name for row in rows].index)
    head = ["", metric, "95 % interval", *(f"minus {other}" for other in others), "chosen", "states, bytes/weight"]
    head += ["seconds a seed"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        minus = [_points(row.minus[other]) if other in row.minus else "" for other in others]
        chosen = ", ".join(f"{key} {shown(value)}{' [1]' * (key in row.edges)}" for key, value in row.chosen.items())
        costs = [f"{row.states:.2f}", f"{row.seconds:.0f}"] if row.seconds is not None else ["", ""]
        lines.append([row.name, percent(row.accuracy), " .. ".join(map(percent, row.interval)), *minus, chosen, *costs])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentences(rows: Sequence[Result]) -> list[str]:
    """One for each difference."""
    said = []
    for row in rows:
        for other, minus in row.minus.items():
            where = "above" if minus.points > 0 else "below" if minus.points < 0 else "level with"
            low, high = (percent(end, "+") for end in minus.interval)
            said.append(f"{row.name}: {percent(abs(minus.points))} {where} {other} ({low} .. {high}), {minus.verdict}")
    return said


def _points(minus: Difference) -> str:
    low, high = (percent(end, "+") for end in minus.interval)
    return f"{percent(minus.points, '+')} ({low} .. {high}){'' if minus.verdict == 'clear of zero' else ' ~'}"


def _write(comparison: Comparison, metric: str, rows: list[Result], counts: tuple[int, int]) -> None:
    seeds, problems = counts
    facts = {"job": str(comparison.job), "words": comparison.words, "development": comparison.config.development}
    facts |= {"metric": metric, "seeds": seeds, "problems": problems, "versions": versions()}
    facts |= {"date": time.strftime("%Y-%m-%d"), "rows": [asdict(row) for row in rows]}
    write_bytes(comparison.folder / "compare.json", json.dumps(facts, indent=1).encode())
    drawn = _figures(rows, metric)
    for name, svg in drawn.items():
        write_bytes(comparison.folder / name, svg.encode())
    notes = [
        f"{seeds} seeds, {problems} held-out problems. Differences are paired by problem and seed; ~ marks those "
        "inside the noise. Of twenty intervals of 95 % one misses by chance."
    ]
    if any(row.edges for row in rows):
        notes.append("[1] At an end of what was tried: beyond it may be better.")
    parts = [f"# {comparison.folder.name}", table(rows, metric), *notes, *(f"![]({name})" for name in drawn)]
    parts.append("\n".join(f"- {sentence}" for sentence in sentences(rows)))
    write_bytes(comparison.folder / "compare.md", ("\n\n".join(parts) + "\n").encode())


def _figures(rows: Sequence[Result], metric: str) -> dict[str, str]:
    """By file name, of what there is to draw."""
    families: dict[str, list[figures.Point]] = {}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.ratio is not None:
            point = figures.Point(row.ratio, row.accuracy, row.interval, row.states)
            families.setdefault(_family(row), []).append(point)
        if len(row.chosen) == 1 and _is_number(value := next(iter(row.chosen.values()))) and float(value) > 0:
            ((key, _),) = row.chosen.items()
            curves.setdefault(key, {})[row.name] = [(float(values[key]), mean) for mean, values in row.tried]
    lines = {name: sorted(points) for name, points in families.items()}
    drawn = {"ratio.svg": figures.by_ratio(lines, metric)} if any(len(points) > 1 for points in lines.values()) else {}
    return drawn | {f"{key}.svg": figures.by_value(key, lines, metric) for key, lines in curves.items()}


def _family(row: Result) -> str:
    """Its name without the ratio."""
    ratios = {shown(value) for key, value in row.settings.items() if key.endswith(".ratio")}
    return ", ".join(part for part in row.name.split(", ") if part not in ratios)
