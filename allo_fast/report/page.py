"""One self-contained report.html for people."""

import html
import json
from pathlib import Path

from allo_fast.config import UserError
from allo_fast.data.prompts import as_text
from allo_fast.durable import write_bytes
from allo_fast.method.objectives import Npo
from allo_fast.report import figures
from allo_fast.report.summary import (
    is_preference,
    more_lines,
    percent,
    score_name,
    shown,
    shown_interval,
    trained_line,
)
from allo_fast.runs.home import REPORT
from allo_fast.runs.rows import read_jsonl, read_log
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import stages_of
from allo_fast.stages.forget import threshold_of, token_weights
from allo_fast.stages.models import tokenizer_of
from allo_fast.training.guard import CHANGE, REPEATED

_SHOWN_RESPONSES = 6


def write_report(run: Run, summary: dict) -> None:
    """Writes report.html; nothing in it is loaded from elsewhere."""
    quality = _preferences(summary) if is_preference(summary) else _accuracies(summary)
    parts = [_header(run, summary), quality, _first_row(summary), _costs(summary), _curves(run)]
    stages = stages_of(run.config)
    parts += [_selection(run)] if "locate" in stages else []
    parts += [_responses(run)] if "forget" in stages else []
    style = Path(__file__).with_name("report.css").read_text()
    body = "\n".join(parts)
    title = html.escape(f"allo-fast: {run.config.name}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style><main>{body}</main></html>'
    )
    write_bytes(run.folder / REPORT, page.encode())


def _header(run: Run, summary: dict) -> str:
    differences = "".join(
        f"<li><b>{html.escape(name)}</b> {percent(difference['points'], '+')} <span>95 % interval "
        f"{percent(difference['ci95'][0], '+')} .. {percent(difference['ci95'][1], '+')}, paired by problem</span></li>"
        for name, difference in summary["differences"].items()
    )
    return (
        f"<header><h1>{html.escape(run.config.name)}</h1><p>protocol {summary['protocol']}, "
        f"{len(summary['seeds'])} seed(s), base {html.escape(str(run.config.model.name_or_path or 'pretrained here'))}"
        f"{', fine-tuned here (sft)' if run.config.sft else ''}</p>"
        f"<p>{_rows(summary['data'])}</p><ul>{differences}</ul></header>"
    )


def _rows(data: dict[str, dict[str, int]]) -> str:
    used = [f"data.{key}: {counts['rows']} rows, {counts['set_aside']} set aside" for key, counts in data.items()]
    return "; ".join(used + trained_line(data["test"]))


def _accuracies(summary: dict) -> str:
    first = next(iter(summary["models"].values()))
    name = score_name(first).capitalize()
    over = " over the base's responses, as the reward model expects them," * (name == "Wins")
    return _section(
        name,
        f"{name}{over} on {first['n']} problems of data.test; bars are means over seeds, dots single seeds, whiskers "
        f"95 % intervals. {'; '.join(more_lines(summary['models']))}",
        figures.accuracy_bars(
            {key: {"mean": model["accuracy"], **model} for key, model in summary["models"].items()}, name.lower()
        ),
    )


def _preferences(summary: dict) -> str:
    models = summary["models"]
    rows = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{name}</td><td>{shown(name, metric['mean'])}</td>"
        f"<td>{shown_interval(name, metric['ci95'])}</td><td>{metric.get('ties', '')}</td></tr>"
        for label, model in models.items()
        for name, metric in model["metrics"].items()
    )
    head = "".join(f"<th>{name}</th>" for name in ("model", "metric", "mean", "95 % interval", "ties"))
    bars = "".join(
        figures.accuracy_bars({m: row["metrics"][name] for m, row in models.items() if name in row["metrics"]}, name)
        for name in ("rewards/accuracies", "logps/accuracies", "logps/accuracies_per_token")
    )
    first = next(iter(models.values()))
    return _section(
        "Preferences",
        f"On {first['pairs']} pairs of {first['n']} problems of data.test. Rewards are beta (log pi - log pi0) against "
        "the base, which has none itself; log-probabilities alone, summed or by the token, depend on lengths. Ties are "
        "wrong. Bars are means over seeds, dots single seeds, whiskers 95 % intervals, clustered by problem.",
        bars + f"<table><tr>{head}</tr>{rows}</table>",
    )


def _first_row(summary: dict) -> str:
    """What the first row trains in each stage that reads rows, with the special tokens that no other place shows."""
    shown: dict[str, dict[str, str]] = {}
    for unit, facts in summary["stages"].items():
        if "first_row" in facts:
            shown.setdefault(unit.partition("/")[0], facts["first_row"])  # of the first seed
    rows = "".join(
        f"<figure><figcaption>{stage}: {html.escape(name)}</figcaption><p class=tokens>{html.escape(text)}</p></figure>"
        for stage, row in shown.items()
        for name, text in row.items()
    )
    return _section("First row", "As it is trained, special tokens included.", rows)


def _costs(summary: dict) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{stage['seconds']:.1f} s</td>"
        f"<td>{stage['peak_bytes'] / 2**20:,.0f} MiB</td>"
        f"<td>{_number(stage.get('tokens_per_second'))}</td><td>{_share(stage)}</td>"
        f"<td>{_states(stage)}</td></tr>"
        for name, stage in summary["stages"].items()
    )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("stage", "time", "peak memory", "tokens / s", "weights trained", "state bytes / parameter")
    )
    text = "Peak memory is the whole process's, or the GPU's where one is used. States are counted from live tensors."
    return _section("Cost", text, f"<table><tr>{head}</tr>{rows}</table>")


def _states(stage: dict) -> str:
    states = _number(stage.get("state_bytes_per_parameter"), 2)
    if locating := stage.get("locating"):  # of a stage that locates for itself
        states += f", locating {_number(locating['state_bytes_per_parameter'], 2)}"
    return states


def _curves(run: Run) -> str:
    plots = []
    for stage in ("sft", "warmup", "forget", "learn"):
        if stage in stages_of(run.config):
            seeds = {u.key: read_log(u) for u in run.units([stage])}
            if seeds := {key: rows for key, rows in seeds.items() if rows}:  # not those of a log that was lost
                plots.append(figures.training_curves(stage, seeds))
    return _section("Training", "Loss and rewards per optimizer step; one line a seed.", "".join(plots))


def _selection(run: Run) -> str:
    unit = run.units(["locate"])[0]
    counts = json.loads((unit.folder / "counts.json").read_text())
    trained = [stage for stage in counts if stage in stages_of(run.config)]
    maps = "".join(figures.selection_map(stage, counts[stage]) for stage in trained)
    return _section("Selected weights", f"Share of each matrix that trains ({html.escape(unit.key)}).", maps)


def _responses(run: Run) -> str:
    unit: Unit = run.units(["forget"])[0]
    title = "Wrong responses, by token"
    try:
        tokenizer = tokenizer_of(unit)
    except (UserError, OSError) as error:  # a report needs the run alone
        return _section(title, f"Not shown: {error}", "")
    rows = read_jsonl(unit.needed("rewards") / "rewards.jsonl")
    threshold = threshold_of(run.config)
    responses = []
    for row in rows[:: max(1, len(rows) // _SHOWN_RESPONSES)][:_SHOWN_RESPONSES]:
        tokens = [tokenizer.decode([token]) for token in row["response_ids"]]
        weights = token_weights(row["rewards"], threshold)
        spans = "".join(
            f'<span style="background:rgba(200,60,40,{0.75 * weight:.2f})" title="reward {reward:.3f}">'
            f"{html.escape(token)}</span>"
            for token, reward, weight in zip(tokens, row["rewards"], weights, strict=True)
        )
        question = html.escape(as_text(row["prompt"]))
        responses.append(f"<figure><figcaption>{question}</figcaption><p class=tokens>{spans}</p></figure>")
    return _section(
        title,
        f"Shade: the token's weight in forgetting. Point at a token for its reward.{_forgotten(unit)}",
        "".join(responses),
    )


def _forgotten(unit: Unit) -> str:
    """What forgetting did to the tokens that it forgets, and to those that it must not."""
    facts = unit.manifest()["facts"]
    gave, cost = facts.get(Npo.CHANGE), facts.get(CHANGE)
    said = []
    if gave is not None:
        said.append(f"Before its last step the log-probability of a forgotten token had changed by {gave:+.3f}")
    if cost is not None:
        said.append(f"After it that of a token of right responses had changed by {cost:+.3f}")
    if (more := facts.get(REPEATED)) is not None:
        said.append(f"The share of greedy responses that repeats runs of four tokens had changed by {more:+.3f}")
    if "ended_before_steps" in facts:
        said.append(f"It ended after {facts['steps']} of {facts['ended_before_steps']} steps")
    return "".join(f" {sentence}." for sentence in said)


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{content}</section>"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _share(stage: dict) -> str:
    if "selected" not in stage:
        return ""
    return f"{stage['selected'] / stage['parameters']:.2%}, {stage['changed'] / stage['selected']:.1%} moved"
