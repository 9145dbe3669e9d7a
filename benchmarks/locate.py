"""What each way of locating selects, against the dense warm-up: overlap of the selected sets, time, memory.

For every seed of a job its stages up to the warm-up run (or are found complete), then scores are made at the frozen
base on the warm-up's own pairs. overlap: of the top 1, 5 and 10 % by a score, the share that the warm-up selects too.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure

from allo_fast.__main__ import main
from allo_fast.config import GRADIENT_SCORES, Config
from allo_fast.config_file import load_config
from allo_fast.data.corpus import Corpus
from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.durable import versions
from allo_fast.locating.files import stored_scores
from allo_fast.locating.sweep import Sweep
from allo_fast.locating.windows import Piece, pieces_of
from allo_fast.method.objectives import Preference
from allo_fast.method.scores import Given, Random
from allo_fast.method.selection import Selection, changes
from allo_fast.model.loading import load_model
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import named_weights, size_of
from allo_fast.plan.windows import windows
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, stages_of
from allo_fast.stages.gradients import drawn
from allo_fast.stages.models import base_path
from allo_fast.training.examples import Examples

RATIOS = (0.01, 0.05, 0.1)


@dataclass(frozen=True)
class Row:
    seed: int
    score: str
    pairs: int
    steps: int
    windows: int
    overlap: tuple[float, ...]  # by ratio
    seconds: float | None = None  # wall time; of the warm-up, of its steps
    cpu_s: float | None = None
    bytes_per_weight: float | None = None  # states, counted from live tensors


@dataclass(frozen=True)
class Variant:
    score: str
    pairs: int
    clip: bool = True
    reordered: bool = False
    windows: int = 1
    dtype: str | None = None  # of the base; None: the job's
    note: str = ""


def run(path: Path, overrides: list[str], scores: list[str], variants: bool, out: Path | None) -> list[Row]:
    """Prints a table; with `out`, a folder, writes locate.json and locate.svg there. variants: of `linear`, too."""
    overrides = [*overrides, "rivals=[dpo]"]
    config = load_config(path, overrides)
    stages = stages_of(config)
    for stage in stages[: stages.index("warmup") + 1]:
        if STAGES[stage].keys(config) and main([stage, str(path), *overrides]):
            raise SystemExit(f"{stage} failed")
    owner, rows, chosen = Run(config, STAGES), [], {}
    for seed in config.seeds:
        for row, selections in _measured(Unit(owner, "warmup", f"seed-{seed}"), scores, variants):
            rows.append(row)
            chosen[seed, row.score, row.pairs] = selections
            _print(row)
    between = dict(_between_seeds(chosen, config))
    for name, overlaps in between.items():
        print(f"{name:<34}" + "".join(f"{overlap:>9.3f}" for overlap in overlaps))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        facts = {"config": config.model_dump(), "ratios": RATIOS, "versions": versions(), "between_seeds": between}
        facts |= {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads()}
        (out / "locate.json").write_text(json.dumps({**facts, "rows": [*map(asdict, rows)]}, indent=1))
        _plot(rows).savefig(out / "locate.svg", metadata={"Date": None})
    return rows


def _measured(unit: Unit, names: list[str], variants: bool) -> Iterator[tuple[Row, list[Selection]]]:
    config, folder = unit.config, unit.folder
    base = load_model(base_path(unit), config.model)
    after = load_model(folder / "model", config.model, dtype="float32")
    corpus = corpus_of_pairs(read_jsonl(unit.needed("pairs") / "pairs.jsonl"))
    truth = _selections(changes(base, after))
    steps = read_jsonl(folder / "metrics.jsonl")
    seconds = sum(step["seconds"] for step in steps)
    bytes_per_weight = unit.manifest()["facts"]["state_bytes_per_parameter"]
    everything = len(corpus.examples)
    yield Row(unit.seed, "delta", everything, len(steps), 1, (1.0,) * 3, seconds, None, bytes_per_weight), truth
    del after
    tried = [Variant(name, everything) for name in names]
    tried += _variants(config, everything, pieces_of(base)) if variants else []
    for variant in tried:
        if variant.score in GRADIENT_SCORES:
            model = load_model(base_path(unit), config.model, dtype=variant.dtype) if variant.dtype else base
            row, selections = _swept(unit, ResponseLogps(model), corpus, variant)
        else:
            weights = named_weights(base)
            scores = {
                "magnitude": {key: Given(weight) for key, weight in weights.items()},
                "random": {key: Random(key, weight.numel(), unit.seed) for key, weight in weights.items()},
            }[variant.score]
            row, selections = Row(unit.seed, variant.score, 0, 0, 0, ()), _selections(scores)
        overlaps = tuple(overlap(mine, its) for mine, its in zip(selections, truth, strict=True))
        yield Row(**asdict(row) | {"overlap": overlaps}), selections


def _variants(config: Config, pairs: int, pieces: list[Piece]) -> Iterator[Variant]:
    yield Variant("linear", pairs, clip=False, note="no clipping")
    yield Variant("linear", pairs, reordered=True, note="pairs in another order")
    if config.model.dtype != "bfloat16":
        yield Variant("linear", pairs, dtype="bfloat16", note="bfloat16")
    for part in (2, 4, 8):
        if pairs // part >= config.warmup.examples_per_step:
            yield Variant("linear", pairs // part)
    yield Variant("linear", pairs, windows=windows(config.locate, "linear", pieces, None))


def _swept(unit: Unit, logps: ResponseLogps, corpus: Corpus, variant: Variant) -> tuple[Row, list[Selection]]:
    train, seed = unit.config.warmup, unit.seed
    with tempfile.TemporaryDirectory() as folder:
        part = drawn(corpus, variant.pairs, train, seed)
        examples = Examples(part, train, seed + 1000 if variant.reordered else seed)
        started, cpu = time.perf_counter(), time.process_time()
        objective, how = Preference(train.beta), {"windows": variant.windows, "clip": variant.clip}
        sweep = Sweep(logps, examples, objective, train, variant.score, Path(folder), **how)
        for _ in sweep.run():
            pass
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        sizes = {key: size_of(weight) for key, weight in named_weights(logps.model).items()}
        selections = _selections(stored_scores(Path(folder), sizes))
    label = ", ".join(filter(None, (variant.score, variant.note)))
    held = sum(sweep.state_bytes.values()) / sum(sizes.values())
    counts = len(part.examples), len(examples.steps), len(sweep.windows)
    return Row(unit.seed, label, *counts, (), seconds, cpu, held), selections


def _selections(scores) -> list[Selection]:
    return [Selection.from_scores(scores, ratio, base="") for ratio in RATIOS]


def overlap(first: Selection, second: Selection) -> float:
    """The share of the first's weights that the second has too."""
    both = 0
    for name in first.names:
        both += int(torch.isin(first.positions(name).unpack(), second.positions(name).unpack()).sum())
    return both / first.selected


def _between_seeds(chosen: dict, config: Config) -> Iterator[tuple[str, list[float]]]:
    """Of the same score, what two seeds have in common: other pairs of the same base."""
    for label in dict.fromkeys(score for _, score, _ in chosen):
        most = {seed: next(chosen[key] for key in chosen if key[:2] == (seed, label)) for seed in config.seeds}
        pairs = list(combinations(config.seeds, 2))
        if pairs:
            both = [[overlap(a, b) for a, b in zip(most[one], most[other], strict=True)] for one, other in pairs]
            yield f"{label}, between seeds", [fmean(column) for column in zip(*both, strict=True)]


def _print(row: Row) -> None:
    if row.score == "delta":
        heads = "".join(f"{f'top {ratio:.0%}':>9}" for ratio in RATIOS)
        print(f"seed {row.seed:<29}{heads}{'pairs':>7}{'windows':>9}{'seconds':>9}{'cpu_s':>8}{'bytes/weight':>14}")
    overlaps = "".join(f"{value:>9.3f}" for value in row.overlap)
    measured = "".join(
        f"{'-' if value is None else format(value, '.1f'):>{width}}"
        for value, width in ((row.seconds, 9), (row.cpu_s, 8), (row.bytes_per_weight, 14))
    )
    print(f"{row.score:<34}{overlaps}{row.pairs:>7}{row.windows:>9}{measured}", flush=True)


def _plot(rows: list[Row]) -> Figure:
    """Overlap by the share of the pairs that were looked at, and by score; a dot a seed."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    by_pairs, by_score = figure.subplots(1, 2)
    most = max(row.pairs for row in rows)
    labels = list(dict.fromkeys(row.score for row in rows if row.score != "delta"))
    for ratio, color in zip(RATIOS, ("#8d99ae", "#e0a03a", "#2a7f62"), strict=True):
        place = RATIOS.index(ratio)
        linear = [row for row in rows if row.score == "linear"]
        by_pairs.scatter([row.pairs / most for row in linear], [r.overlap[place] for r in linear], s=14, color=color)
        whole = [row for row in rows if row.score in labels and row.pairs in (0, most)]
        by_score.scatter(
            [row.overlap[place] for row in whole],
            [labels.index(row.score) for row in whole],
            s=14,
            color=color,
            label=f"top {ratio:.0%}",
        )
    by_pairs.set(title="linear, by the share of pairs", xscale="log", ylim=(0, 1), ylabel="overlap with the warm-up")
    by_score.set(title="by score", xlim=(0, 1), yticks=range(len(labels)), yticklabels=labels)
    by_score.invert_yaxis()
    by_score.legend()
    return figure
