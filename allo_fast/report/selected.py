"""Where the selected weights are: by layer and matrix, by kind, and how many two selections have in common."""

import json
from collections import defaultdict
from itertools import combinations

from allo_fast.method.selection import Selection
from allo_fast.report import figures
from allo_fast.report.markup import section, table, wide
from allo_fast.report.summary import percent
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import stages_of

_ENTRIES = 100_000_000  # that two selections are compared in, at most


def section_of(run: Run) -> str:
    units = run.units(["locate"])
    counts = _counts(units[0])
    trained = [stage for stage in counts if stage in stages_of(run.config)]
    maps = "".join(wide(figures.selection_map(stage, counts[stage])) for stage in trained)
    kinds = {stage: _by_kind(counts[stage]) for stage in trained}
    rows = [(kind, *(percent(kinds[stage][kind]) for stage in trained)) for kind in kinds[trained[0]]]
    shares = table(("of all selected weights", *trained), rows)
    text = f"Share of each matrix that trains ({units[0].key}), and what the selected weights are."
    return section("Selected weights", text, maps + shares + _overlaps(units, trained))


def _counts(unit: Unit) -> dict[str, dict[str, list[int]]]:
    """By stage and tensor [selected, size]."""
    return json.loads((unit.folder / "counts.json").read_text())


def _by_kind(counts: dict[str, list[int]]) -> dict[str, float]:
    """Of all selected weights those of every kind of matrix; counts: tensor -> [selected, size]."""
    total, kinds = sum(selected for selected, _ in counts.values()) or 1, defaultdict(int)
    for name, (selected, _) in counts.items():
        kinds[figures.kind_of(name)] += selected
    return {kind: selected / total for kind, selected in sorted(kinds.items(), key=lambda item: -item[1])}


def _overlaps(units: list[Unit], trained: list[str]) -> str:
    """Between stages and between seeds, the share of the smaller selection."""
    files = {f"{stage}, {unit.key}": unit.folder / f"{stage}.safetensors" for unit in units for stage in trained}
    if len(files) < 2:
        return ""
    if sum(n for unit in units for stage in trained for n, _ in _counts(unit)[stage].values()) > _ENTRIES:
        return f"<p>With more than {_ENTRIES:,} selected weights, selections are not compared here.</p>"
    chosen = {name: Selection.load(path) for name, path in files.items()}
    rows = []
    for (first, ours), (second, theirs) in combinations(chosen.items(), 2):
        if {*first.split(", ")} & {*second.split(", ")}:  # two stages of a seed, or two seeds' of a stage
            by_chance = max(ours.selected, theirs.selected) / ours.parameters
            rows.append((f"{first} and {second}", percent(ours.overlap(theirs)), percent(by_chance)))
    return table(("in common, of the smaller one", "share", "by chance"), rows)
