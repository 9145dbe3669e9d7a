"""One epoch of DPO: ours against TRL's DPOTrainer, dense and with adapters, on the same pairs, token for token.

Every contender runs in a process of its own, so that peak memory is its own; rivals in the environment that `make
rivals` makes. Repeats go through the contenders forwards and backwards in turn. Each process first shows that its loss
falls, which is its warm-up, and then an epoch is timed with its reference pass: ours over all pairs before the first
step, TRL's in every step. The log-probabilities before a first update must be those of the first row.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from allo_fast.config import UserError
from allo_fast.durable import versions
from benchmarks.inputs import SHAPES, draw_rows, random_llama, read_rows, useful_tokens, write_rows
from benchmarks.step_measure import Job, Outcome

ROOT = Path(__file__).parents[1]
RIVALS = ROOT / ".venv-rivals/bin/python"
ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]+(Error|Exception)\b")
ABSENT = f"{RIVALS.parents[1].name} is absent"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "bfloat16-model": 0.05}  # of log-probabilities, relative
HEAD = ("contender", "dtype", "pairs/s", "CPU s/pair", "x TRL", "useful/s", "useful", "peak GB", "own GB")
HEAD += ("state GB", "trained")


@dataclass(frozen=True)
class Settings:
    """What the command line takes, whose help says what each is."""

    model: str | None  # None: a random Llama
    random: str  # of which size
    dtypes: Sequence[str]
    shapes: Sequence[str]
    train: Path | None  # instead of the shapes
    contenders: Sequence[str]
    ratio: float
    pairs: int
    step_pairs: int
    micro_pairs: int
    repeats: int
    ours: dict


@dataclass(frozen=True)
class Row:
    shape: str
    contender: str
    dtype: str
    useful_tokens: int  # of the epoch
    outcomes: list[Outcome]
    error: str = ""  # why there is no outcome

    @property
    def failed(self) -> bool:
        return bool(self.error) and not self.error.startswith(ABSENT)

    def median(self, name: str) -> float:
        return statistics.median(getattr(outcome, name) for outcome in self.outcomes)

    @property
    def cost(self) -> float:
        """Seconds a pair: of CPU time, which neighbours on the machine change least; on a GPU of the clock."""
        return self.median("seconds" if torch.cuda.is_available() else "cpu_seconds") / self.outcomes[0].pairs


def run(settings: Settings, out: Path | None = None) -> list[Row]:
    """Prints a table a shape; writes JSON with the machine, versions and every repeat when `out` is given."""
    rows, about = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, job, pairs in _jobs(settings, Path(folder)):
            about[name] = _lengths(pairs)
            measured = _measure_shape(name, job, settings, useful_tokens(pairs), Path(folder))
            print(f"{name}: {len(pairs)} pairs, {about[name]}", table(measured), sep="\n", flush=True)
            rows += measured
            if out:  # after each shape: an epoch of them all may take an hour
                stated = {**machine(), **asdict(settings), "lengths": about, "rows": [*map(asdict, rows)]}
                out.write_text(json.dumps(stated, indent=1, default=str))
    print(f"Useful tokens: {useful_tokens.__doc__.partition(chr(10))[0]}")
    return rows


def profile(settings: Settings, folder: Path) -> None:
    """Of ours alone: prints where an epoch's time goes, and writes a trace of it for each shape and dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for shape, job, _ in _jobs(settings, Path(scratch)):
            for contender, dtype in _lineup(settings):
                if is_ours(contender):
                    print(f"{shape}, {contender}, {dtype}", flush=True)
                    trace = folder / f"{shape}-{contender}-{dtype}.json"
                    named = replace(job, contender=contender, dtype=dtype, profile=str(trace.absolute()))
                    outcome = _launch(named, Path(scratch), quiet=False)
                    if isinstance(outcome, str):
                        raise UserError(f"{contender}: {outcome}")


def _jobs(settings: Settings, folder: Path) -> Iterator[tuple[str, Job, list[dict]]]:
    """Of each shape its name, its job without a contender, and the pairs."""
    model = settings.model or str(random_llama(folder, settings.random))
    vocabulary = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    check = write_rows(folder / "check.jsonl", draw_rows(SHAPES["choice"], 8, vocabulary, seed=1)[::4])
    drawn = {name: draw_rows(SHAPES[name], settings.pairs, vocabulary) for name in settings.shapes}
    given = settings.train and {settings.train.name: read_rows(settings.train, settings.pairs)}
    for name, pairs in (given or drawn).items():
        path = write_rows(folder / "pairs.jsonl", pairs)
        sizes = {"step_pairs": settings.step_pairs, "micro_pairs": settings.micro_pairs}
        if name == "groups":  # no problem is cut in two
            sizes = {key: -(-size // 5) * 5 for key, size in sizes.items()}
        yield (
            name,
            Job("", "", model, str(check), str(path), **sizes, ratio=settings.ratio, settings=settings.ours),
            pairs,
        )


def _lineup(settings: Settings) -> list[tuple[str, str]]:
    """Which contenders run in which dtypes; ours has weights of bfloat16 wherever it computes in it."""
    every = [(contender, dtype) for dtype in settings.dtypes for contender in settings.contenders]
    return [(contender, dtype) for contender, dtype in every if not is_ours(contender) or dtype != "bfloat16-model"]


def _measure_shape(shape: str, job: Job, settings: Settings, useful: int, folder: Path) -> list[Row]:
    lineup = _lineup(settings)
    found: dict[tuple[str, str], list[Outcome]] = {key: [] for key in lineup}
    errors: dict[tuple[str, str], str] = {}
    for repeat in range(settings.repeats):
        for key in lineup if repeat % 2 == 0 else lineup[::-1]:
            if key in errors:
                continue
            outcome = _launch(replace(job, contender=key[0], dtype=key[1]), folder)
            print(f"{shape}, {', '.join(key)}, repeat {repeat + 1}: {outcome}", file=sys.stderr, flush=True)
            if isinstance(outcome, str):
                errors[key] = outcome
            else:
                found[key].append(outcome)
    rows = [Row(shape, *key, useful, outcomes, errors.get(key, "")) for key, outcomes in found.items()]
    return _checked(rows)


def _launch(job: Job, folder: Path, quiet: bool = True) -> Outcome | str:
    """What a process measured, or in one line why it did not."""
    ours = is_ours(job.contender)
    if not ours and not RIVALS.exists():
        return f"{ABSENT}: make rivals"
    launcher = [sys.executable if ours else str(RIVALS), "-m"]
    if job.contender == "sparse-2-ranks":
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    (result := folder / "outcome.json").unlink(missing_ok=True)
    module = "benchmarks.step_ours" if ours else "benchmarks.step_rivals"
    done = subprocess.run(
        [*launcher, module, json.dumps(asdict(job)), str(result)],
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"},
    )
    if done.returncode:
        return f"failed with {done.returncode}: {reason(done.stderr)}"
    return Outcome(**json.loads(result.read_text()))


def reason(stderr: str) -> str:
    """The line that says why; behind what a rank raised stands its launcher's own report."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["it said nothing"]
    return next(filter(ERROR.match, lines), lines[-1])


def _checked(rows: list[Row]) -> list[Row]:
    """A row whose log-probabilities are not those of the first one that ran trained something else: an error."""
    first = next((row for row in rows if row.outcomes), None)
    checked = []
    for row in rows:
        if row.outcomes:
            logps, others = row.outcomes[0].logps, first.outcomes[0].logps
            near = max(TOLERANCE[row.dtype], TOLERANCE[first.dtype])
            if not all(abs(a - b) <= near * abs(b) for a, b in zip(logps, others, strict=True)):
                row = replace(row, outcomes=[], error=f"its log-probabilities are {logps}, the first row's {others}")
        checked.append(row)
    return checked


def table(rows: list[Row]) -> str:
    """x TRL: how many times the pairs of TRL's dense row of the same dtype in the same time.

    useful: useful tokens among the positions that training's forward passes computed. peak: of the process; own:
    without what its imports hold. A GPU has its allocated memory in both.
    """
    form = "{:<20} {:<15}{:>8}{:>12}{:>8}{:>10}{:>8}{:>9}{:>8}{:>10}{:>13}"
    lines = [form.format(*HEAD)]
    trl = {row.dtype: row.cost for row in rows if row.contender == "trl" and row.outcomes}
    for row in rows:
        if row.error:
            lines.append(f"{row.contender:<20} {row.dtype:<15}  {row.error}")
            continue
        seconds, peak = row.median("seconds"), row.median("peak_bytes")
        cells = [f"{row.outcomes[0].pairs / seconds:.3f}", f"{row.median('cpu_seconds') / row.outcomes[0].pairs:.3f}"]
        cells += [f"{trl[row.dtype] / row.cost:.2f}" if row.dtype in trl else "-", f"{row.useful_tokens / seconds:.0f}"]
        cells += [f"{row.useful_tokens / row.median('positions'):.1%}", f"{peak / 1e9:.2f}"]
        cells += [f"{(peak - row.median('import_bytes')) / 1e9:.2f}", f"{row.median('state_bytes') / 1e9:.3f}"]
        lines.append(form.format(row.contender, row.dtype, *cells, f"{row.outcomes[0].trained:,}"))
    return "\n".join(lines)


def is_ours(contender: str) -> bool:
    return not contender.startswith(("trl", "peft"))


def _lengths(rows: list[dict]) -> str:
    names = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    means = (f"{word} {statistics.fmean(len(row[name]) for row in rows):.0f}" for name, word in names.items())
    return f"tokens in the mean: {', '.join(means)}"


def machine() -> dict:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
    }


def _processor() -> str:
    """Its name, and whether it multiplies bfloat16 in matrix units."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "cpu"
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {'with' if 'amx_bf16' in text else 'without'} AMX"
