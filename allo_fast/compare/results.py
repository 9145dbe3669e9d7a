"""What a comparison says: how good each arm is, and which differences are more than chance."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from statistics import fmean

import numpy as np

from allo_fast.compare import figures
from allo_fast.compare.arms import Comparison, Trial, Values, shown
from allo_fast.config import UserError
from allo_fast.data.intervals import Interval, accuracy_interval, difference_interval
from allo_fast.data.scoring import REWARD, scorer_name
from allo_fast.durable import versions, write_bytes
from allo_fast.report.summary import ACCURACIES, percent, preference_values
from allo_fast.runs.rows import Rows, read_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, stages_of
from allo_fast.stages.evaluate import PREDICTIONS

_REWARDS = ACCURACIES["rewards"]
Tried = list[tuple[float, Values]]  # what each candidate got on development data, -inf where it did not train


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
    """Of an arm, or of the base, which has no settings and costs nothing.

    chosen: on development data, with `tried`, what each candidate got there. edges: chosen keys of which no candidate
    was beyond the best. ties: of which another value was as good. states: bytes per parameter, of what it trains, a
    dense warm-up too, with most. seconds: of a seed, in what it trains, locates and scores, since each was
    last started. ratio: of the weights that train in the end.
    """

    name: str
    accuracy: float
    interval: Interval
    seeds: list[float]
    minus: dict[str, Difference]
    chosen: Values = field(default_factory=dict)
    tried: Tried = field(default_factory=list)
    edges: list[str] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    states: float | None = None
    seconds: float | None = None
    ratio: float | None = None
    settings: Values = field(default_factory=dict)


def values_of(run: Run, key: str | None = None, preference: str = ACCURACIES["logps"]) -> tuple[str, np.ndarray]:
    """The metric, and its numbers, fp64 [seeds, problems]; key: of the one unit that judges the base; None: the arm.

    preference: what pairs are judged by. The base, which has no rewards, gets half of them right, as by chance.
    """
    rows = [list(predictions) for predictions in _predictions(run, key)]
    if run.config.data.format == "preference":
        if key == "base" and preference == _REWARDS:
            return preference, np.full((1, len(rows[0])), 0.5)
        values = preference_values(rows, 1.0)[0]
        if preference not in values:
            raise UserError(f"metric: {preference}: {run.folder}: its base, which has none, cannot be compared with")
        return preference, np.array(values[preference])
    metric, scorer = "wins" if REWARD in rows[0][0] else "accuracy", scorer_name(run.config.data.scorer)
    return metric, np.array([[float(row[scorer]) for row in seed] for seed in rows])


def mean_reward(runs: Sequence[Run]) -> float:
    """Of what the models of these runs answer."""
    return fmean(row[REWARD] for run in runs for predictions in _predictions(run, None) for row in predictions)


def _predictions(run: Run, key: str | None) -> list[Rows]:
    keys = [key] if key else [f"{run.config.method}-seed-{seed}" for seed in run.config.seeds]
    return [read_jsonl(Unit(run, "evaluate", key).folder / PREDICTIONS) for key in keys]


def results(
    comparison: Comparison, finals: Sequence[tuple[Trial, Tried]], failed: Mapping[str, str]
) -> tuple[str, list[Result]]:
    """The metric; of the base and every arm, which are complete; writes compare.json, compare.md and its figures.

    failed: of the other arms, why they are left out.
    """
    runs = {trial.arm.name: Run(trial.config, STAGES, folder=trial.folder) for trial, _ in finals}
    if not runs:
        raise UserError(f"{comparison.folder}: no arm is left to compare")
    preference = comparison.config.metric
    bases = {name: values_of(run, "base", preference)[1] for name, run in runs.items()}
    metric, first = values_of(next(iter(runs.values())), "base", preference)
    values = {"base": first} | {name: values_of(run, None, preference)[1] for name, run in runs.items()}
    _check_alike(runs)
    against = [name for name in comparison.config.against if name in values]
    trials = {trial.arm.name: (trial, tried) for trial, tried in finals}
    rows = []

    def pair(better: str, worse: str) -> tuple[np.ndarray, np.ndarray]:
        """Each arm beside its own base."""
        first = bases[worse] if better == "base" else values[better]
        return first, bases[better] if worse == "base" else values[worse]

    for name, numbers in values.items():
        score, interval = accuracy_interval(numbers.tolist())
        if name == "base" and metric in ("wins", _REWARDS):  # over itself
            interval = (0.5, 0.5)
        minus = {other: Difference(*difference_interval(*pair(name, other))) for other in against if other != name}
        row = Result(name=name, accuracy=score, interval=interval, seeds=numbers.mean(1).tolist(), minus=minus)
        if name in trials:
            trial, tried = trials[name]
            costs = dict(zip(("states", "seconds", "ratio"), _costs(runs[name]), strict=True))
            own = {"chosen": trial.values, "tried": tried, "edges": edges(trial.values, tried)}
            row = replace(row, settings=trial.arm.settings, ties=ties(trial.values, tried), **own, **costs)
        rows.append(row)
    notes = [f"{name}: left out: {why}" for name, why in failed.items()] + _unfair(comparison, bases, rows)
    _write(comparison, metric, rows, values[next(iter(runs))].shape, notes)
    return metric, rows


def _unfair(comparison: Comparison, bases: Mapping[str, np.ndarray], rows: Sequence[Result]) -> list[str]:
    """What makes some differences something else than others."""
    first = next(iter(bases.values()))
    others = {name: percent(base.mean()) for name, base in bases.items() if not np.array_equal(base, first)}
    notes = [f"{name} begins from another base, of {mean}, which `base` means for it." for name, mean in others.items()]
    both = sorted({*comparison.development_seeds} & {*comparison.seeds})
    if both and any(row.tried for row in rows):
        notes.append(f"Seed {', '.join(map(str, both))} chose, too, which favours arms with many candidates.")
    return notes


def _check_alike(runs: Mapping[str, Run]) -> None:
    """Raises UserError where an arm was not judged on the same problems as the others, or wins over another base."""
    problems: dict[str, list[str]] = {}
    bases: dict[str, list[float | None]] = {}
    for name, run in runs.items():
        bases[name] = [row.get(REWARD) for row in _predictions(run, "base")[0]]
        if bases[name] != next(iter(bases.values())):
            first = next(iter(bases))
            raise UserError(f"arms: {name} has another base than {first}; a reward model sees wins over one base alone")
        for predictions in _predictions(run, None):
            problems[name] = [row["id"] for row in predictions]
            if problems[name] != next(iter(problems.values())):
                raise UserError(f"arms: {name} was judged on other problems than {next(iter(problems))}")


def edges(chosen: Values, tried: Tried) -> list[str]:
    """Chosen numbers at an end of what was tried: beyond it might be better ones."""
    found = []
    for key, value in chosen.items():
        numbers = sorted({values[key] for _, values in tried if _is_number(values[key])})
        if len(numbers) > 1 and value in (numbers[0], numbers[-1]):
            found.append(key)
    return found


def ties(chosen: Values, tried: Tried) -> list[str]:
    """Chosen keys of which another value was as good."""
    best = max((mean for mean, _ in tried), default=0.0)
    return [
        key for key, value in chosen.items() if any(mean == best and values[key] != value for mean, values in tried)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _costs(run: Run) -> tuple[float, float, float | None]:
    """State bytes per parameter, seconds of a seed, and the ratio of weights that train; None of adapters."""
    config, names = run.config, stages_of(run.config)
    own = [stage for stage in names if stage in ("warmup", "locate", "rewards", "forget", "learn")]
    manifests = {stage: [unit.manifest() for unit in run.units([stage])] for stage in own}
    trains = [stage for stage in ("warmup", "forget", "learn") if stage in names]
    states = max(m["facts"]["state_bytes_per_parameter"] for stage in trains for m in manifests[stage])
    seconds = sum(fmean(m["seconds"] for m in of_stage) for of_stage in manifests.values())
    if config.method == "dpo":
        return states, seconds, None if config.warmup.lora else 1.0
    return states, seconds, config.learn.ratio


def table(rows: Sequence[Result], metric: str) -> str:
    """In Markdown."""
    others = sorted({other for row in rows for other in row.minus}, key=[row.name for row in rows].index)
    head = ["", metric, "95 % interval", *(f"minus {other}" for other in others), "chosen", "states, bytes/weight"]
    head += ["seconds a seed"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        minus = [_points(row.minus[other]) if other in row.minus else "" for other in others]
        marks = {key: " [1]" * (key in row.edges) + " [2]" * (key in row.ties) for key in row.chosen}
        chosen = ", ".join(f"{key} {shown(value)}{marks[key]}" for key, value in row.chosen.items())
        costs = [f"{row.states:.2f}", f"{row.seconds:.0f}"] if row.seconds is not None else ["", ""]
        lines.append([row.name, percent(row.accuracy), " .. ".join(map(percent, row.interval)), *minus, chosen, *costs])
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def sentences(rows: Sequence[Result]) -> list[str]:
    """One for each difference; of two that are compared both ways, the later one's."""
    said, names = [], [row.name for row in rows]
    for row in rows:
        for other, minus in row.minus.items():
            if names.index(other) > names.index(row.name) and row.name in rows[names.index(other)].minus:
                continue
            where = "above" if minus.points > 0 else "below" if minus.points < 0 else "level with"
            low, high = (percent(end, "+") for end in minus.interval)
            said.append(f"{row.name}: {percent(abs(minus.points))} {where} {other} ({low} .. {high}), {minus.verdict}")
    return said


def _points(minus: Difference) -> str:
    low, high = (percent(end, "+") for end in minus.interval)
    return f"{percent(minus.points, '+')} ({low} .. {high}){'' if minus.verdict == 'clear of zero' else ' ~'}"


def _write(comparison: Comparison, metric: str, rows: list[Result], counts: tuple[int, int], notes: list[str]) -> None:
    seeds, problems = counts
    facts = {"job": str(comparison.job), "words": comparison.words, "development": comparison.config.development}
    facts |= {"development_seeds": comparison.development_seeds, "notes": notes}
    facts |= {"metric": metric, "seeds": seeds, "problems": problems, "versions": versions()}
    facts |= {"date": time.strftime("%Y-%m-%d"), "rows": [_as_json(row) for row in rows]}
    write_bytes(comparison.folder / "compare.json", json.dumps(facts, indent=1).encode())
    drawn = _figures(rows, metric)
    for name, svg in drawn.items():
        write_bytes(comparison.folder / name, svg.encode())
    notes = [
        *notes,
        f"{seeds} seed{'s' * (seeds > 1)}, {problems} held-out problems. Differences are paired by problem and seed; ~ "
        "marks those inside the noise. Of twenty intervals of 95 % one misses by chance.",
    ]
    if any(row.edges for row in rows):
        notes.append("[1] At an end of what was tried: beyond it may be better.")
    if any(row.ties for row in rows):
        notes.append("[2] Another value was as good on development data; of equal ones the first is taken.")
    parts = [f"# {comparison.folder.name}", table(rows, metric), *notes, *(f"![]({name})" for name in drawn)]
    parts.append("\n".join(f"- {sentence}" for sentence in sentences(rows)))
    write_bytes(comparison.folder / "compare.md", ("\n\n".join(parts) + "\n").encode())


def _as_json(row: Result) -> dict:
    """JSON has no infinity: null is what did not train."""
    tried = [(mean if isfinite(mean) else None, values) for mean, values in row.tried]
    return {**asdict(row), "tried": tried}


def _figures(rows: Sequence[Result], metric: str) -> dict[str, str]:
    """By file name, of what there is to draw."""
    families: dict[str, list[figures.Point]] = {}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.ratio is not None:
            point = figures.Point(row.ratio, row.accuracy, row.interval, row.states)
            families.setdefault(_family(row), []).append(point)
        if len(row.chosen) == 1:
            ((key, _),) = row.chosen.items()
            points = [(values[key], mean) for mean, values in row.tried if _is_number(values[key]) and values[key] > 0]
            points = [point for point in points if isfinite(point[1])]
            if len(points) > 1:
                curves.setdefault(key, {})[row.name] = points
    lines = {name: sorted(points) for name, points in families.items() if len(points) > 1}
    levels = {row.name: row.accuracy for row in rows if any(row.name in other.minus for other in rows)}
    drawn = {"ratio.svg": figures.by_ratio(lines, levels, metric)} if lines else {}
    return drawn | {f"{key}.svg": figures.by_value(key, lines, metric) for key, lines in curves.items()}


def _family(row: Result) -> str:
    """Its name without the ratio."""
    ratios = {shown(value) for key, value in row.settings.items() if key.endswith(".ratio")}
    return ", ".join(part for part in row.name.split(", ") if part not in ratios)
