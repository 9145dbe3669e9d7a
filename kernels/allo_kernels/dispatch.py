"""Which implementation runs: decided once per operation and device, said once in the log."""

import functools
import importlib
import importlib.util
import logging
import os
from typing import TypeVar

import torch

logger = logging.getLogger("allo_kernels")
T = TypeVar("T")  # a function, or a module of functions
OLDEST = (8, 0)  # compute capability: Ampere, the first with bfloat16 matrix units


def choose(op: str, impl: str, definition: T, kernel: str, device: torch.device) -> T:
    """The implementation of `op` that `impl` names: "torch" its `definition`, "triton" its kernel, "auto" the faster.

    kernel: "module.function" in this package, or "module" for all of it, imported only when it runs. `auto` is Triton
    on CUDA devices that can run it, else PyTorch. Raises ValueError for any other name, and for "triton" where Triton
    cannot run.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "auto":
        impl = _automatic(op, device)
    elif impl == "triton" and device.type != "meta" and (reason := _why_not(device)):  # on meta a launch is recorded
        raise ValueError(f"impl: 'triton' cannot run {op} here: {reason}")
    if impl == "torch":
        return definition
    module, _, function = kernel.partition(".")
    found = importlib.import_module(f"allo_kernels.{module}")
    return getattr(found, function) if function else found


@functools.cache
def _automatic(op: str, device: torch.device) -> str:
    reason = "the CPU runs PyTorch" if device.type == "cpu" else _why_not(device)
    say = logger.warning if reason and device.type == "cuda" else logger.info
    say("%s: %s%s", op, "torch" if reason else "triton", f" ({reason})" if reason else "")
    return "torch" if reason else "triton"


def _why_not(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return None if interpreting() else "a CPU tensor needs TRITON_INTERPRET=1 set before Triton is imported"
    if device.type != "cuda":
        return f"no kernels for {device.type} devices"
    if torch.version.hip:
        return "tuned and tested for NVIDIA devices only"
    found = torch.cuda.get_device_capability(device)
    return None if found >= OLDEST else f"compute capability {found[0]}.{found[1]} is older than 8.0"


def interpreting() -> bool:
    """Whether Triton runs kernel bodies in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # what Triton accepts
