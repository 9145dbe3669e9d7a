"""The report's figures, as SVG text."""

import io
import re

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402  the backend is chosen first
from matplotlib.figure import Figure  # noqa: E402

from allo_fast.report.summary import percent  # noqa: E402

_COLORS = {"given": "#c3cad6", "base": "#8d99ae", "dpo": "#e0a03a", "sparse-dpo": "#7a5aa6", "allo": "#2a7f62"}
_LAYER = re.compile(r"\.(\d+)\.(.+)$")
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})


def accuracy_bars(models: dict[str, dict], title: str = "") -> str:
    """One bar a model, its 95 % interval, a dot per seed; models: name -> {mean, ci95, seeds}."""
    figure, axis = plt.subplots(figsize=(6, 0.6 + 0.5 * len(models)), layout="constrained")
    for row, (name, metric) in enumerate(models.items()):
        mean, (low, high) = metric["mean"], metric["ci95"]
        axis.barh(row, mean, color=_COLORS.get(name, "#5b7db1"), height=0.6)
        axis.errorbar(mean, row, xerr=[[mean - low], [high - mean]], color="#222", capsize=4)
        axis.scatter(metric["seeds"], [row] * len(metric["seeds"]), s=10, color="white", edgecolors="#222", zorder=3)
        axis.text(high, row, f"  {percent(mean)}", va="center")
    axis.set_title(title, fontsize=9)
    axis.set_yticks(range(len(models)), list(models))
    axis.invert_yaxis()
    axis.set_xlim(0, min(1.0, 1.25 * max(metric["ci95"][1] for metric in models.values())) or 1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return as_svg(figure, f"{title or 'accuracy'} of each model")


def training_curves(stage: str, seeds: dict[str, list[dict]]) -> str:
    """Loss, and rewards where the stage has them; dashed, of the pairs that do not train."""
    names = [name for name in ("loss", "rewards/margins", "rewards/accuracies", "grad_norm") if name in _first(seeds)]
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 2.1), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        held_out = ""
        for label, rows in seeds.items():
            (line,) = axis.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=1.2, label=label)
            if looks := [(row["step"], row[f"eval_{name}"]) for row in rows if f"eval_{name}" in row]:
                axis.plot(*zip(*looks, strict=True), linewidth=1.2, color=line.get_color(), linestyle="--")
                held_out = "; dashed: held out"
        axis.set_title(f"{stage}: {name}{held_out}", fontsize=9)
        axis.set_xlabel("step")
    return as_svg(figure, f"training curves of {stage}")


def selection_map(stage: str, counts: dict[str, list[int]]) -> str:
    """Share selected per layer (rows) and matrix (columns); counts: tensor -> [selected, size]."""
    cells, outside = {}, {}
    for name, (selected, size) in counts.items():
        match = _LAYER.search(name)
        key = (int(match[1]), _short(match[2])) if match else None
        if match:
            cells[key] = selected / size
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


def _first(seeds: dict[str, list[dict]]) -> dict:
    return next((rows[0] for rows in seeds.values() if rows), {})


def _short(name: str) -> str:
    parts = [part for part in name.removesuffix(".weight").split(".") if part not in ("model", "self_attn", "mlp")]
    return ".".join(parts)


def as_svg(figure: Figure, label: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
