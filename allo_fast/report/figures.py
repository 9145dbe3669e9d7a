"""The report's figures, as SVG text; letters and axes take the page's colour, in light and dark."""

import hashlib
import io
import re

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402  the backend is chosen first
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from allo_fast.report.summary import percent  # noqa: E402

_COLORS = {"given": "#c3cad6", "base": "#8d99ae", "dpo": "#e0a03a", "sparse-dpo": "#8a6bb8", "allo": "#2a9d78"}
_LAYER = re.compile(r"\.(\d+)\.(.+)$")
_INK = "#010203"  # stands for the page's colour of text
_METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "kl", "grad_norm")
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
plt.rcParams.update({"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"})
plt.rcParams.update({f"{part}.color": _INK for part in ("text", "xtick", "ytick")})
plt.rcParams.update({"axes.edgecolor": _INK, "axes.labelcolor": _INK, "axes.titlecolor": _INK})


def accuracy_bars(models: dict[str, dict], title: str = "") -> str:
    """One bar a model, its 95 % interval, a dot per seed; models: name -> {mean, ci95, seeds}."""
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.45 * len(models)), layout="constrained")
    for row, (name, metric) in enumerate(models.items()):
        mean, (low, high) = metric["mean"], metric["ci95"]
        axis.barh(row, mean, color=_COLORS.get(name, "#5b7db1"), height=0.6)
        axis.errorbar(mean, row, xerr=[[mean - low], [high - mean]], color=_INK, capsize=4)
        axis.scatter(metric["seeds"], [row] * len(metric["seeds"]), s=12, color="white", edgecolors="#222", zorder=3)
        end = (max(high, *metric["seeds"]), row)
        axis.annotate(percent(mean), end, xytext=(8, 0), textcoords="offset points", va="center")
    axis.set_title(title, fontsize=9)
    axis.set_yticks(range(len(models)), list(models))
    axis.invert_yaxis()
    axis.set_xlim(0, min(1.0, 1.25 * max(metric["ci95"][1] for metric in models.values())) or 1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return as_svg(figure, f"{title or 'accuracy'} of each model")


def training_curves(stages: dict[str, dict[str, list[dict]]]) -> list[str]:
    """One figure a metric, its stages side by side, as wide as they are long; dashed, of the pairs that do not train.

    stages: name -> seed -> a row a step.
    """
    found = []
    for metric in _METRICS:
        having = {name: seeds for name, seeds in stages.items() if any(_has(rows, metric) for rows in seeds.values())}
        if not having:
            continue
        lengths = [max(rows[-1]["step"] for rows in seeds.values()) for seeds in having.values()]
        ratios = [max(length, max(lengths) / 3) for length in lengths]
        labels = list(max(having.values(), key=len))
        # Places that are given are not fitted to the letters first, which would draw every figure twice.
        places = {"left": 0.09, "right": 0.9 if len(labels) > 1 else 0.99, "bottom": 0.25, "top": 0.86, "wspace": 0.36}
        figure, axes = plt.subplots(
            1, len(having), figsize=(9, 1.9), squeeze=False, width_ratios=ratios, gridspec_kw=places
        )
        for axis, (name, seeds) in zip(axes[0], having.items(), strict=True):
            _curve(axis, metric, seeds)
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("step")
            axis.margins(x=0.02)
            axis.grid(alpha=0.2)
        axes[0][0].set_ylabel(metric)
        if len(labels) > 1:
            figure.legend(labels, loc="upper right", fontsize=7, frameon=False)
        found.append(as_svg(figure, f"{metric} by training step"))
    return found


def _curve(axis: Axes, metric: str, seeds: dict[str, list[dict]]) -> None:
    for number, rows in enumerate(seeds.values()):
        color = f"C{number}"
        for key, style in ((metric, "-"), (f"eval_{metric}", "--")):
            if points := [(row["step"], row[key]) for row in rows if key in row]:
                axis.plot(*zip(*points, strict=True), linewidth=1.3, color=color, linestyle=style)


def stage_times(stages: dict[str, dict]) -> str:
    """A bar a stage, all its seeds' parts behind one another; stages: "02-sample/seed-0" -> {seconds}."""
    parts: dict[str, list[float]] = {}
    for unit, stage in stages.items():
        parts.setdefault(unit.partition("/")[0], []).append(stage["seconds"])
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.26 * len(parts)), layout="constrained")
    for row, seconds in enumerate(parts.values()):
        begin = 0.0
        for number, spent in enumerate(seconds):
            axis.barh(row, spent, left=begin, color=("#2a9d78", "#8fc7b3")[number % 2], height=0.65)
            begin += spent
        axis.text(begin, row, f"  {begin:,.0f} s", va="center", fontsize=8)
    axis.set_yticks(range(len(parts)), list(parts))
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("seconds")
    return as_svg(figure, "time by stage")


def selection_map(stage: str, counts: dict[str, list[int]]) -> str:
    """Share selected per layer (rows) and matrix (columns); counts: tensor -> [selected, size]."""
    cells, outside = {}, {}
    for name, (selected, size) in counts.items():
        match = _LAYER.search(name)
        if match:
            cells[int(match[1]), _short(match[2])] = selected / size
        else:
            outside[_short(name)] = selected / size
    layers = sorted({layer for layer, _ in cells})
    matrices = list(dict.fromkeys(matrix for _, matrix in cells))
    grid = [[cells.get((layer, matrix), float("nan")) for matrix in matrices] for layer in layers]
    figure, axis = plt.subplots(figsize=(1.5 + 0.62 * len(matrices), 1.6 + 0.2 * len(layers)), layout="constrained")
    image = axis.imshow(grid, aspect="auto", cmap="YlGnBu", vmin=0)
    axis.set_xticks(range(len(matrices)), matrices, rotation=40, ha="right")
    axis.set_yticks(range(len(layers))[:: max(1, len(layers) // 10)], layers[:: max(1, len(layers) // 10)])
    axis.set_ylabel("layer")
    others = ", ".join(f"{name} {share:.2%}" for name, share in outside.items())
    axis.set_title(f"{stage}; outside the layers: {others}", fontsize=8, loc="left")
    figure.colorbar(image, ax=axis, format=lambda value, _: f"{value:.0%}")
    return as_svg(figure, f"share of weights selected for {stage}, per layer and matrix")


def kind_of(name: str) -> str:
    """What a tensor is, whichever layer it is of."""
    match = _LAYER.search(name)
    return _short(match[2] if match else name)


def _has(rows: list[dict], metric: str) -> bool:
    return any(metric in row or f"eval_{metric}" in row for row in rows)


def _short(name: str) -> str:
    parts = [part for part in name.removesuffix(".weight").split(".") if part not in ("model", "self_attn", "mlp")]
    return ".".join(parts)


def as_svg(figure: Figure, label: str, alone: bool = False) -> str:
    """alone: a file of its own, on white."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, facecolor="white" if alone else "none")
    plt.close(figure)
    svg = text.getvalue()
    if not alone:
        svg = svg.replace(_INK, "currentColor")
        own = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"  # one page has many figures
        svg = re.sub(r'(\bid="|"url\(#|url\(#|href="#)', rf"\g<1>{own}", svg)
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
