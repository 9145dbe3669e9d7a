"""The figures of a comparison, as SVG text."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

from matplotlib import pyplot as plt

from allo_fast.report.figures import as_svg


class Point(NamedTuple):
    ratio: float
    accuracy: float
    interval: tuple[float, float]
    states: float  # bytes per parameter


def by_ratio(lines: Mapping[str, Sequence[Point]], levels: Mapping[str, float], metric: str) -> str:
    """Accuracy against the ratio of weights that train; on the second axis the bytes of their states.

    levels: accuracies to compare with, as the base's.
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, level), style in zip(levels.items(), cycle((":", "--", "-.")), strict=False):
        axis.axhline(level, color="#555555", linewidth=0.9, linestyle=style, label=name)
    second = axis.twinx()
    second.spines["right"].set_visible(True)
    for name, points in lines.items():
        ratios, middle = [p.ratio for p in points], [p.accuracy for p in points]
        spread = [[p.accuracy - p.interval[0] for p in points], [p.interval[1] - p.accuracy for p in points]]
        axis.errorbar(ratios, middle, yerr=spread, marker="o", markersize=4, linewidth=1.2, capsize=3, label=name)
    states = sorted({(p.ratio, p.states) for points in lines.values() for p in points})
    second.plot(*zip(*states, strict=True), ".", color="#999999")
    second.set_ylabel("states, bytes per parameter (grey)")
    second.set_ylim(0)
    axis.set_xscale("log")
    axis.set_xlabel("weights that train")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    return _finished(figure, axis, metric)


def by_value(key: str, lines: Mapping[str, Sequence[tuple[float, float]]], metric: str) -> str:
    """What candidates got on development data, against one key, as a learning rate; lines: (value, accuracy)."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1.2, label=name)
    axis.set_xscale("log")
    axis.set_xlabel(key)
    return _finished(figure, axis, f"{metric} on development data")


def _finished(figure, axis, metric: str) -> str:
    axis.set_ylabel(metric)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return as_svg(figure, metric, alone=True)
