"""One self-contained report.html for people."""

from collections import Counter
from html import escape
from pathlib import Path

from allo_fast.durable import write_bytes
from allo_fast.report import costs, figures, samples, selected
from allo_fast.report.markup import facts, section, table, wide
from allo_fast.report.summary import (
    answer_lines,
    is_preference,
    more_lines,
    percent,
    score_name,
    shown,
    shown_interval,
    trained_line,
)
from allo_fast.runs.home import CONFIG, REPORT
from allo_fast.runs.rows import read_jsonl, read_log
from allo_fast.runs.run import Run
from allo_fast.stages import stages_of
from allo_fast.stages.problems import QUARANTINE

_SET_ASIDE = 3  # rows that are shown of each reason


def write_report(run: Run, summary: dict) -> None:
    """Writes report.html; nothing in it is loaded from elsewhere."""
    stages = stages_of(run.config)
    parts = [_header(run, summary), _preferences(summary) if is_preference(summary) else _accuracies(summary)]
    parts += [(samples.answers_to_some if is_preference(summary) else samples.before_and_after)(run)]
    parts += [_curves(run)]
    parts += [selected.section_of(run)] if "locate" in stages else []
    parts += [samples.forgotten_tokens(run)] if "forget" in stages else []
    parts += [costs.section_of(run, summary), _rows(run, summary)]
    style, script = (Path(__file__).with_name(f"report.{kind}").read_text() for kind in ("css", "js"))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(f"allo-fast: {run.config.name}")}</title>'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<style>{style}</style><main>{chr(10).join(parts)}</main><script>{script}</script></html>"
    )
    write_bytes(run.folder / REPORT, page.encode())


def _header(run: Run, summary: dict) -> str:
    config = run.config
    said = "".join(
        f"<li><b>{escape(name)}</b> {percent(difference['points'], '+')} <span>95 % interval "
        f"{percent(difference['ci95'][0], '+')} .. {percent(difference['ci95'][1], '+')}, paired by problem: "
        f"{_meaning(difference)}</span></li>"
        for name, difference in summary["differences"].items()
    )
    base = str(config.model.name_or_path or "pretrained here") + ", fine-tuned here (sft)" * bool(config.sft)
    counted = {
        key: f"{counts['rows']:,} rows, {counts['set_aside']:,} set aside" for key, counts in summary["data"].items()
    }
    test = "held out of data.train" if config.data.test_size else config.data.test
    told = [
        ("method", f"{config.method}, protocol {config.protocol}; seeds {' '.join(map(str, config.seeds))}"),
        ("base", f"{base}; {config.model.dtype}"),
        ("data.train", f"{config.data.train}: {counted['train']}"),
        ("data.test", f"{test}: {counted['test']}"),
        *(("but", line) for line in trained_line(summary["data"]["test"])),
        ("command", f"allo-fast run {CONFIG}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in summary["versions"].items())),
    ]
    every = escape((run.folder / CONFIG).read_text())
    settings = f"<details><summary>{CONFIG}: every setting</summary><pre>{every}</pre></details>"
    return f"<header><h1>{escape(config.name)}</h1><ul>{said}</ul>{facts(told)}{settings}</header>"


def _meaning(difference: dict) -> str:
    low, high = difference["ci95"]
    return "inside the noise" if low <= 0 <= high else "clear of zero"


def _accuracies(summary: dict) -> str:
    models = summary["models"]
    first = next(iter(models.values()))
    name = score_name(first).capitalize()
    over = " over the base's responses, as the reward model expects them," * (name == "Wins")
    text = (
        f"{name}{over} on {first['n']} problems of data.test; bars are means over seeds, dots single seeds, whiskers "
        f"95 % intervals. {'; '.join(more_lines(models) + answer_lines(models))}"
    )
    bars = figures.accuracy_bars(
        {key: {"mean": model["accuracy"], **model} for key, model in models.items()}, name.lower()
    )
    rows = [
        (
            *(label, percent(model["accuracy"]), shown_interval(name, model["ci95"])),
            *(" ".join(map(percent, model["seeds"])), *map(percent, model["scorers"].values())),
        )
        for label, model in models.items()
    ]
    head = ("model", name.lower(), "95 % interval", "each seed", *(f"by {scorer}" for scorer in first["scorers"]))
    return section(name, text, wide(bars) + table(head, rows))


def _preferences(summary: dict) -> str:
    models = summary["models"]
    rows = [
        (label, name, shown(name, each["mean"]), shown_interval(name, each["ci95"]), str(each.get("ties", "")))
        for label, model in models.items()
        for name, each in model["metrics"].items()
    ]
    bars = "".join(
        wide(
            figures.accuracy_bars(
                {m: row["metrics"][name] for m, row in models.items() if name in row["metrics"]}, name
            )
        )
        for name in ("rewards/accuracies", "logps/accuracies", "logps/accuracies_per_token")
    )
    first = next(iter(models.values()))
    return section(
        "Preferences",
        f"On {first['pairs']} pairs of {first['n']} problems of data.test. Rewards are beta (log pi - log pi0) against "
        "the base, which has none itself; log-probabilities alone, summed or by the token, depend on lengths. Ties are "
        "wrong. Bars are means over seeds, dots single seeds, whiskers 95 % intervals, clustered by problem.",
        bars + table(("model", "metric", "mean", "95 % interval", "ties"), rows),
    )


def _curves(run: Run) -> str:
    stages = {}
    for stage in ("sft", "warmup", "forget", "learn"):
        if stage in stages_of(run.config):
            seeds = {unit.key: read_log(unit) for unit in run.units([stage])}
            if seeds := {key: rows for key, rows in seeds.items() if rows}:  # not those of a log that was lost
                stages[stage] = seeds
    text = "One line a seed, as wide as the stage is long beside the others."
    held_out = any("eval_loss" in row for seeds in stages.values() for rows in seeds.values() for row in rows)
    plots = "".join(wide(svg) for svg in figures.training_curves(stages))
    return section("Training", text + " Dashed: pairs that are held out." * held_out, plots)


def _rows(run: Run, summary: dict) -> str:
    """The first row of each stage that reads rows, with the special tokens that no other place shows; and what was not
    used."""
    first: dict[str, dict[str, str]] = {}
    for unit, said in summary["stages"].items():
        if "first_row" in said:
            first.setdefault(unit.partition("/")[0], said["first_row"])  # of the first seed
    html = "".join(samples.first_row(stage, row) for stage, row in first.items())
    units = [run.units(["sample"])[0], next(unit for unit in run.units(["evaluate"]) if unit.key == "base")]
    counts, names = Counter(), {}
    for key, unit in zip(("data.train", "data.test"), units, strict=True):
        for row in read_jsonl(unit.folder / QUARANTINE):
            reason = key, row["reason"]
            counts[reason] += 1
            if counts[reason] <= _SET_ASIDE:
                names.setdefault(reason, []).append(row["id"])
    aside = [(*reason, str(n), ", ".join(map(str, names[reason]))) for reason, n in counts.most_common()]
    html += table(("from", "set aside because", "rows", "as"), aside) if aside else ""
    said = "The first row as it is trained, special tokens included. " + "No row was set aside." * (not aside)
    return section("Rows", said, html)
