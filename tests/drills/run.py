"""What drills know of a run: its job, names and files, and where a command can be made to stop."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

import allo_fast.commands as cli
from allo_fast.data.arithmetic import arithmetic_row
from allo_fast.runs.unit import Unit

CONFIG = "job.yaml"  # the user's, in the folder where commands run
RUN = Path("runs/drill")
MANIFEST, STARTED, SAVED_CONFIG = "MANIFEST.json", "STARTED.json", "config.yaml"
CHECKPOINTS = "checkpoint*.safetensors"  # of a unit that is not complete
PARTIAL_ROWS = "[!m]*.jsonl"  # of such a unit, rows that perhaps are not all there yet; not its metrics.jsonl
CACHE = "cache"  # folder of a run of what can be computed again
ASIDE = "old-"  # how folders begin into which --rerun moves units
PRETRAIN = "00-pretrain/base"
SAMPLE, PAIRS, WARMUP, LOCATE = "02-sample/seed-0", "03-pairs/seed-0", "04-warmup/seed-0", "05-locate/seed-0"
REWARDS, FORGET, LEARN = "06-rewards/seed-0", "07-forget/seed-0", "08-learn/seed-0"
BASE_EVALUATED, DPO_EVALUATED, ALLO_EVALUATED = (f"09-evaluate/{key}" for key in ("base", "dpo-seed-0", "allo-seed-0"))
UNITS = [SAMPLE, PAIRS, WARMUP, LOCATE, REWARDS, FORGET, LEARN, BASE_EVALUATED, DPO_EVALUATED, ALLO_EVALUATED]
STAGES = "sample pairs warmup locate rewards forget learn evaluate".split()
# What differs between two runs of the same job: wall times, memory, and what is made of them.
WALL = {"seconds", "peak_bytes", "tokens_per_second", "sha256 of this file"}
NOT_COMPARED = {"report.html", "log.txt"}  # they show them
RERUN = "--rerun"

# Every stage in a second or two; save_steps is below the steps of each.
JOB = """# a comment of the user's
name: drill
output_dir: runs
rivals: [dpo]
model: {name_or_path: base, dtype: float32}
data: {train: train.jsonl, test: test.jsonl, prompt_template: "{}="}
sample: {max_new_tokens: 8, num_return_sequences: 3, batch_size: 2}
pairs: {gold: missing}
locate: {windows: 2}
warmup: {learning_rate: 1e-4, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, save_steps: 2}
rewards:
  template: "{}#{}#{}>"
  ratio: 1.0
  train: {num_train_epochs: 1, gradient_accumulation_steps: 2, save_steps: 2}
forget: {learning_rate: 1e-3, threshold: 0.03, gradient_accumulation_steps: 2, save_steps: 2}
learn: {learning_rate: 1e-3, gradient_accumulation_steps: 1, ratio: 0.1, save_steps: 2}
evaluate: {max_new_tokens: 8, batch_size: 4}
"""
# The same with as few steps as there can be, for a fault at each of its operations.
TINY = [
    *("data.train=train.jsonl[:3]", "data.test=test.jsonl[:3]", "sample.batch_size=2", "evaluate.batch_size=2"),
    *("locate.windows=1", "learn.gradient_accumulation_steps=2", "warmup.save_steps=1", "learn.save_steps=1"),
    "rewards.train.save_steps=1",
]
# A model from nothing, which becomes the base of the job above.
PRETRAIN_JOB = """
name: drill
output_dir: runs
model: {dtype: float32}
data: {train: "arithmetic:train[:4]", test: "arithmetic:test[:4]", prompt_template: "{}="}
pretrain:
  {problems: 64, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
   per_device_train_batch_size: 8, save_steps: 2}
"""


def reference_of(run: Path) -> Path:
    """The file of log-probabilities that was written last."""
    return max(run.glob(f"{CACHE}/*/reference-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def write_job(folder: Path) -> None:
    """The job's configuration and its data."""
    (folder / CONFIG).write_text(JOB)
    for name, split, rows in (("train", "train", range(1000, 1012)), ("test", "test", range(8))):
        lines = [json.dumps(arithmetic_row(split, number)) for number in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def checkpoints(unit: Path) -> list[Path]:
    """The oldest first."""
    return sorted(unit.glob(CHECKPOINTS), key=lambda path: path.stat().st_mtime_ns)


def checkpoint_step(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["about"])["step"]


def sigkill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang_up() -> None:
    """Nobody listens any more to what is said, as where a terminal is closed or `tee` ended."""
    read, write = os.pipe()
    os.close(read)
    for output in (1, 2):
        os.dup2(write, output)


def stop_after(
    stage: str, done: int, *signals: int, noun: str | None = None, first: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """For `before`: a command sends itself `signals`, by default SIGKILL, once a unit of `stage` has done so many."""

    def patch() -> None:
        execute = Unit.execute

        def stopped(unit: Unit):
            left = list(signals or [signal.SIGKILL])
            for progress in execute(unit):
                if left and unit.name == stage and progress.done >= done and noun in (None, progress.noun):
                    first()
                    while left:
                        os.kill(os.getpid(), left.pop(0))
                yield progress

        Unit.execute = stopped

    return patch


def stop_in_report() -> None:
    """For `before`: a command is killed when it begins to write the report."""
    cli.write_report = lambda *_: sigkill()


def kill_at_rename(name: str) -> Callable[[], None]:
    """For `before`: a command is killed before anything gets this name."""

    def patch() -> None:
        for function in ("rename", "replace"):
            rename = getattr(os, function)

            def killed(source, target, *rest, rename=rename, **more):
                if Path(target).name == name:
                    sigkill()
                return rename(source, target, *rest, **more)

            setattr(os, function, killed)

    return patch
