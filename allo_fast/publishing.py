"""`allo-fast export`: the model of a stage as a Hugging Face folder with a model card, and on the hub where asked."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from allo_fast.config import UserError
from allo_fast.durable import write_bytes
from allo_fast.report.summary import percent, shown, shown_interval
from allo_fast.runs.home import CONFIG, SUMMARY
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES
from allo_fast.stages.export import export

_CITATION = """@article{chen2024low,
  title = {Low-Redundant Optimization for Large Language Model Alignment},
  author = {Chen, Zhipeng and Zhou, Kun and Zhao, Wayne Xin and Wang, Jingyuan and Wen, Ji-Rong},
  journal = {arXiv preprint arXiv:2406.12606},
  year = {2024},
}"""


def publish(options: argparse.Namespace) -> None:
    """options: run, stage, out, seed, push_to_hub (a repository's name or None), private."""
    run = Run.read(options.run, STAGES)
    unit = export(run, options.stage, options.out, options.seed)
    write_bytes(options.out / "README.md", model_card(run, unit).encode())
    print(options.out)
    if options.push_to_hub:
        print(push(options.out, options.push_to_hub, options.private))


def model_card(run: Run, unit: Unit) -> str:
    """Of the model of a stage: what it is, how it was made, on what, and how good it is; Markdown."""
    base, facts = run.config.model.name_or_path, unit.manifest()["facts"]
    on_hub = base is not None and not Path(base).exists()
    about = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["allo-fast", run.config.method],
    }
    parts = [
        f"---\n{yaml.safe_dump(({'base_model': base} if on_hub else {}) | about, sort_keys=False)}---",
        f"# {run.config.name}: {unit.name}, {unit.key}",
        _trained(Path(base).name if base else "a model pretrained in the run", facts),
        f"## How it was made\n\n```\nallo-fast run {CONFIG}\n```\n\n<details><summary>{CONFIG}</summary>\n\n"
        f"```yaml\n{(run.folder / CONFIG).read_text()}```\n\n</details>",
    ]
    if (path := run.folder / SUMMARY).is_file():
        parts.append("\n".join(_results(json.loads(path.read_text()))))
    versions = ", ".join(f"{name} {number}" for name, number in unit.manifest()["versions"].items())
    parts += [f"Made with {versions}.", f"## Citation\n\n```bibtex\n{_CITATION}\n```"]
    return "\n\n".join(parts) + "\n"


def _trained(base: str, facts: dict) -> str:
    if "selected" not in facts:
        return f"Trained from {base}."
    share = f"{facts['selected'] / facts['parameters']:.2%}"
    return (
        f"Trained from {base}: {facts['selected']:,} of its {facts['parameters']:,} weights ({share}), and no others."
    )


def _results(summary: dict) -> Iterator[str]:
    yield "## Data and results\n"
    for key, counts in summary["data"].items():
        yield f"- data.{key}: {counts['rows']:,} rows, {counts['set_aside']:,} set aside"
    yield f"\nMeans over seeds {' '.join(map(str, summary['seeds']))}, with 95 % intervals:\n"
    yield "| model | metric | mean | interval |\n|---|---|---|---|"
    for name, model in summary["models"].items():
        metrics = model["metrics"] if "metrics" in model else {"accuracy": model | {"mean": model["accuracy"]}}
        for metric, each in metrics.items():
            yield f"| {name} | {metric} | {shown(metric, each['mean'])} | {shown_interval(metric, each['ci95'])} |"
    yield ""
    for name, difference in summary["differences"].items():
        low, high = (percent(end, "+") for end in difference["ci95"])
        yield f"- {name}: {percent(difference['points'], '+')} ({low} .. {high}), paired by problem"


def push(folder: Path, repository: str, private: bool = False) -> str:
    """The address of what was uploaded. Raises UserError where the hub refuses, or is not reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        address = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"--push-to-hub {repository}: {error}; the folder is whole: {folder}") from error
    return str(address)
