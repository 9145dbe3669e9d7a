"""`allo-fast export`: the model of a stage as a Hugging Face folder with a model card, and on the hub where asked."""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from huggingface_hub import HfApi, try_to_load_from_cache

from allo_fast import signals
from allo_fast.config import UserError
from allo_fast.durable import write_bytes
from allo_fast.method.delta import Delta
from allo_fast.report.summary import more_lines, percent, score_name, shown, shown_interval
from allo_fast.runs.home import CONFIG, SUMMARY
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES
from allo_fast.stages.evaluate import PRODUCERS
from allo_fast.stages.export import export

_CITATION = """@article{chen2024low,
  title = {Low-Redundant Optimization for Large Language Model Alignment},
  author = {Chen, Zhipeng and Zhou, Kun and Zhao, Wayne Xin and Wang, Jingyuan and Wen, Ji-Rong},
  journal = {arXiv preprint arXiv:2406.12606},
  year = {2024},
}"""


def publish(options: argparse.Namespace) -> None:
    """options: run, stage, out, seed, push_to_hub (a repository's name or None), private."""
    if options.private and not options.push_to_hub:
        raise UserError("--private: of what is pushed; add --push-to-hub USER/NAME")
    run, place = Run.read(options.run, STAGES), options.push_to_hub
    address = (
        _on_hub(place, lambda hub: hub.create_repo(place, private=options.private, exist_ok=True)) if place else ""
    )
    unit = export(run, options.stage, options.out, options.seed)
    write_bytes(options.out / "README.md", model_card(run, unit).encode())
    print(options.out)
    if place:
        said = f"{place}: the folder is whole: {options.out}"
        _on_hub(said, lambda hub: hub.upload_folder(repo_id=place, folder_path=options.out))
        print(address)


def model_card(run: Run, unit: Unit) -> str:
    """Of the model of a stage: what it is, how it was made, on what, and how good it is; Markdown."""
    base = run.config.model.name_or_path
    about = {"base_model": base} if base and _is_of_hub(base) else {}
    about |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["allo-fast", run.config.method],
    }
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {run.config.name}: {unit.name}, {unit.key}",
        _trained(run, unit),
        f"## How it was made\n\n```\nallo-fast run {CONFIG}\n```\n\n<details><summary>{CONFIG}</summary>\n\n"
        f"```yaml\n{(run.folder / CONFIG).read_text()}```\n\n</details>",
    ]
    if (path := run.folder / SUMMARY).is_file():
        parts.append("\n".join(_results(json.loads(path.read_text()), unit)))
    versions = ", ".join(f"{name} {number}" for name, number in unit.manifest()["versions"].items())
    parts += [f"Made with {versions}.", f"## Citation\n\n```bibtex\n{_CITATION}\n```"]
    return "\n\n".join(parts) + "\n"


def _is_of_hub(base: str) -> bool:
    """Whether it was loaded from there, not from a folder that is called alike."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    return bool(named) and isinstance(try_to_load_from_cache(base, "config.json"), str)


def _trained(run: Run, unit: Unit) -> str:
    """From what, and how many of its weights: those of earlier stages whose delta this one goes on from, too."""
    base = run.config.model.name_or_path
    if unit.name == "pretrain":
        return "Pretrained in the run."
    name = Path(base).name if base else "a model that the run pretrained"
    before = f"{name}, after fine-tuning in the run (sft)" if run.config.sft and unit.name != "sft" else name
    if not (path := unit.folder / "delta.safetensors").exists():
        return f"Trained from {before}."
    selected, every = sum(map(len, Delta.load(path).positions.values())), unit.manifest()["facts"]["parameters"]
    return f"Trained from {before}: {selected:,} of its {every:,} weights ({selected / every:.2%}), and no others."


def _results(summary: dict, unit: Unit) -> Iterator[str]:
    yield "## Data and results\n"
    for key, counts in summary["data"].items():
        yield f"- data.{key}: {counts['rows']:,} rows, {counts['set_aside']:,} set aside"
    seeds = " ".join(map(str, summary["seeds"]))
    producers = {**PRODUCERS, "given": "pretrain", "base": "sft" if unit.config.sft else "pretrain"}
    this = [f"`{name}`, of {unit.key}" for name in summary["models"] if producers[name] == unit.name]
    yield f"\nThis model is {this[0]}." if this else "\nThis model itself was not judged; others of its run were."
    yield f"Means over seeds {seeds}, with 95 % intervals:\n"
    yield "| model | metric | mean | interval |\n|---|---|---|---|"
    for name, model in summary["models"].items():
        metrics = model["metrics"] if "metrics" in model else {score_name(model): model | {"mean": model["accuracy"]}}
        for metric, each in metrics.items():
            yield f"| {name} | {metric} | {shown(metric, each['mean'])} | {shown_interval(metric, each['ci95'])} |"
    yield "".join(f"\n- {line}" for line in more_lines(summary["models"]))
    for name, difference in summary["differences"].items():
        low, high = (percent(end, "+") for end in difference["ci95"])
        yield f"- {name}: {percent(difference['points'], '+')} ({low} .. {high}), paired by problem"


def _on_hub(said: str, ask: Callable[[HfApi], object]) -> str:
    """What the hub answers. Raises UserError where it refuses, or is not reached, whatever carries the question."""
    try:
        return str(ask(HfApi()))
    except Exception as error:
        signals.check_cause(error)
        raise UserError(f"--push-to-hub {said}: {type(error).__name__}: {error}") from error
