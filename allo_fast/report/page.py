"""What a run found: summary.json for programs, a table for the terminal, one self-contained report.html for people."""

import html
import json
from pathlib import Path

from allo_fast.data.prompts import as_text
from allo_fast.data.scoring import SCORERS, accuracy_interval, difference_interval
from allo_fast.model.loading import load_tokenizer
from allo_fast.report import figures
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run, Unit, versions, write_atomically
from allo_fast.stages import stages_of
from allo_fast.stages.models import base_path

_SHOWN_RESPONSES = 6


def summarize(run: Run) -> dict:
    """Writes summary.json: accuracies with intervals, and what each stage cost. Every unit must be complete."""
    units = run.units(stages_of(run.config))
    manifests = {f"{unit.stage.number:02d}-{unit.name}/{unit.key}": unit.manifest() for unit in units}
    answers = _answers(run)
    scorer = run.config.data.scorer
    models = {}
    for model, seeds in answers.items():
        by_scorer = {name: accuracy_interval([[row[name] for row in rows] for rows in seeds]) for name in SCORERS}
        accuracy, interval = by_scorer[scorer]
        models[model] = {
            "accuracy": accuracy,
            "n": len(seeds[0]),
            "ci95": interval,
            "seeds": [sum(row[scorer] for row in rows) / len(rows) for rows in seeds],
            "scorers": {name: found[0] for name, found in by_scorer.items()},
        }
    summary = {
        "name": run.config.name,
        "protocol": run.config.protocol,
        "seeds": run.config.seeds,
        "models": models,
        "differences": _paired_differences(answers, scorer),
        "stages": {
            name: {"seconds": held["seconds"], "peak_bytes": held["peak_bytes"], **held["facts"]}
            for name, held in manifests.items()
        },
        "versions": versions(),
    }
    write_atomically(run.folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def table(summary: dict) -> str:
    """Accuracies and costs as text."""
    lines = [f"{'model':<8}{'accuracy':>10}{'95 % interval':>20}{'n':>7}{'strict':>9}{'release':>9}  per seed"]
    for name, held in summary["models"].items():
        low, high = held["ci95"]
        both = "".join(f"{accuracy:>9.1%}" for accuracy in held["scorers"].values())
        seeds = " ".join(f"{accuracy:.1%}" for accuracy in held["seeds"])
        lines.append(f"{name:<8}{held['accuracy']:>10.1%}{f'{low:.1%} .. {high:.1%}':>20}{held['n']:>7}{both}  {seeds}")
    for name, held in summary["differences"].items():
        low, high = held["ci95"]
        lines.append(f"{name}: {held['points']:+.1%} ({low:+.1%} .. {high:+.1%})")
    return "\n".join(lines)


def write_report(run: Run, summary: dict) -> None:
    """Writes report.html; nothing in it is loaded from elsewhere."""
    parts = [_header(run, summary), _accuracies(summary), _costs(summary), _curves(run)]
    if run.config.method == "allo":
        parts += [_selection(run), _responses(run)]
    style = Path(__file__).with_name("report.css").read_text()
    body = "\n".join(parts)
    title = html.escape(f"allo-fast: {run.config.name}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style><main>{body}</main></html>'
    )
    write_atomically(run.folder / "report.html", page)


def _answers(run: Run) -> dict[str, list[list[dict]]]:
    """model -> per seed -> predictions, in the order of the test problems."""
    answers: dict[str, list[list[dict]]] = {}
    for unit in run.units(["evaluate"]):
        answers.setdefault(unit.key.partition("-")[0], []).append(read_jsonl(unit.folder / "predictions.jsonl"))
    return answers


def _paired_differences(answers: dict[str, list[list[dict]]], scorer: str) -> dict[str, dict]:
    """Paired by problem, which is far sharper than comparing two intervals."""
    names = list(answers)
    found = {}
    for worse, better in [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]:
        points, interval = difference_interval(
            *([[row[scorer] for row in rows] for rows in answers[name]] for name in (better, worse))
        )
        found[f"{better} - {worse}"] = {"points": points, "ci95": interval}
    return found


def _header(run: Run, summary: dict) -> str:
    differences = "".join(
        f"<li><b>{html.escape(name)}</b> {held['points']:+.1%} "
        f"<span>95 % interval {held['ci95'][0]:+.1%} .. {held['ci95'][1]:+.1%}, paired by problem</span></li>"
        for name, held in summary["differences"].items()
    )
    return (
        f"<header><h1>{html.escape(run.config.name)}</h1><p>protocol {summary['protocol']}, "
        f"{len(summary['seeds'])} seed(s), base {html.escape(str(run.config.model.name_or_path or 'pretrained here'))}"
        f"</p><ul>{differences}</ul></header>"
    )


def _accuracies(summary: dict) -> str:
    count = next(iter(summary["models"].values()))["n"]
    return _section(
        "Accuracy",
        f"On {count} held-out problems; bars are means over seeds, dots single seeds, whiskers 95 % intervals.",
        figures.accuracy_bars(summary["models"]),
    )


def _costs(summary: dict) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{held['seconds']:.1f} s</td>"
        f"<td>{held['peak_bytes'] / 2**20:,.0f} MiB</td>"
        f"<td>{_number(held.get('tokens_per_second'))}</td><td>{_share(held)}</td>"
        f"<td>{_number(held.get('state_bytes_per_parameter'), 2)}</td></tr>"
        for name, held in summary["stages"].items()
    )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("stage", "time", "peak memory", "tokens / s", "weights trained", "state bytes / parameter")
    )
    text = "Peak memory is the whole process's, or the GPU's where one is used. States are counted from live tensors."
    return _section("Cost", text, f"<table><tr>{head}</tr>{rows}</table>")


def _curves(run: Run) -> str:
    drawn = []
    for stage in ("warmup", "forget", "learn"):
        if stage in stages_of(run.config):
            seeds = {u.key: read_jsonl(u.folder / "metrics.jsonl") for u in run.units([stage])}
            drawn.append(figures.training_curves(stage, seeds))
    return _section("Training", "Loss and rewards per optimizer step; one line a seed.", "".join(drawn))


def _selection(run: Run) -> str:
    unit = run.units(["locate"])[0]
    counts = json.loads((unit.folder / "counts.json").read_text())
    drawn = "".join(figures.selection_map(stage, held) for stage, held in counts.items())
    return _section("Selected weights", f"Share of each matrix that trains ({html.escape(unit.key)}).", drawn)


def _responses(run: Run) -> str:
    unit: Unit = run.units(["forget"])[0]
    tokenizer = load_tokenizer(base_path(unit))
    rows = read_jsonl(unit.needed("rewards") / "rewards.jsonl")
    threshold = run.config.forget.threshold if run.config.protocol == "paper" else None
    shown = []
    for row in rows[:: max(1, len(rows) // _SHOWN_RESPONSES)][:_SHOWN_RESPONSES]:
        tokens = [tokenizer.decode([token]) for token in row["response_ids"]]
        weights = [reward if threshold is None else float(reward < threshold) for reward in row["rewards"]]
        spans = "".join(
            f'<span style="background:rgba(200,60,40,{0.75 * weight:.2f})" title="reward {reward:.3f}">'
            f"{html.escape(token)}</span>"
            for token, reward, weight in zip(tokens, row["rewards"], weights, strict=True)
        )
        question = html.escape(as_text(row["prompt"]))
        shown.append(f"<figure><figcaption>{question}</figcaption><p class=tokens>{spans}</p></figure>")
    return _section(
        "Wrong responses, by token",
        "Shade: the token's weight in forgetting. Point at a token for its reward, the rewriter's probability of it.",
        "".join(shown),
    )


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{content}</section>"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _share(held: dict) -> str:
    if "selected" not in held:
        return ""
    return f"{held['selected'] / held['parameters']:.2%}, {held['changed'] / held['selected']:.1%} moved"
