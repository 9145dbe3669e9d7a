"""What one process measures of one contender, the same for ours and for rivals; it imports nothing of the engine.

Before the clock starts, a few steps at a large learning rate must make the loss fall; on a GPU an epoch goes before the
one timed, because kernels are compiled when they are first used. Then one epoch over the pairs is timed, reference
log-probabilities and all, and its peak memory taken.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from allo_kernels import memory

CHECK_STEPS = 4  # of which the last loss must be clearly lower than the first
RATES = {"dense": 3e-4, "some": 1e-3}  # that make it so, where all weights train and where some do
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed")


@dataclass(frozen=True)
class Job:
    """What a process does; paths are strings, so that it goes through JSON."""

    contender: str
    dtype: str  # float32, bfloat16; of rivals also bfloat16-model
    model: str
    check: str  # JSON lines of the few pairs whose loss must fall
    pairs: str  # JSON lines of the epoch's
    step_pairs: int  # an optimizer step
    micro_pairs: int  # a forward pass
    ratio: float  # of the weights that train, where some do
    settings: dict  # of ours: more keys of a train section
    profile: str = ""  # of ours: where a trace goes

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in Path(getattr(self, name)).read_text().splitlines()]


@dataclass(frozen=True)
class Outcome:
    pairs: int
    seconds: float  # of the epoch
    cpu_seconds: float  # of all its threads and ranks
    peak_bytes: int  # resident, of the process; of a GPU, allocated there
    import_bytes: int  # of them, what the process held before it loaded a model; 0 on a GPU
    state_bytes: int  # all live tensors after an update: weights, reference, gradients, moments, positions
    parameters: int
    trained: int
    positions: int  # that training's forward passes computed, padding included
    reference_positions: int  # likewise those without gradients
    losses: list[float]  # of the check
    logps: list[float]  # of the chosen and the rejected responses of the check, before its first update
    versions: dict[str, str]


class Positions:
    """How many a model's forward passes compute, padding included: with gradients, and without."""

    def __init__(self, models: Iterable[nn.Module]):
        self.training, self.reference = 0, 0
        for model in models:
            model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, inputs: tuple) -> None:
        if torch.is_grad_enabled():
            self.training += inputs[0].numel()
        else:
            self.reference += inputs[0].numel()


def resident_bytes() -> int:
    """Of this process, now; 0 where a GPU's memory is what counts."""
    if torch.cuda.is_available() or sys.platform != "linux":
        return 0
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


class Clock:
    """Of an epoch, once its model, optimizer and data are ready."""

    def start(self, device: torch.device) -> None:
        self.device = device
        memory.reset_peak(device)
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float | int]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": memory.peak_bytes(self.device)}


def check_falls(losses: list[float]) -> None:
    """Raises RuntimeError where the last loss is not lower than the first, which is DPO's ln 2."""
    if not losses[-1] < losses[0] - 0.001 or abs(losses[0] - math.log(2)) > 0.05:
        raise RuntimeError(f"its loss does not fall from ln 2: {', '.join(f'{loss:.4f}' for loss in losses)}")


def installed() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(measure: Callable[[Job], Outcome | None]) -> None:
    """`python -m MODULE JOB OUT`: reads a job, as JSON, and writes what came of it; a rank other than 0 gives None."""
    job, out = sys.argv[1:]
    if outcome := measure(Job(**json.loads(job))):
        Path(out).write_text(json.dumps(asdict(outcome)))
