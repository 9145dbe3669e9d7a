"""Every kernel against its definition, on whatever the machine has: a GPU, or Triton's interpreter.

A number that is only copied or counted must be equal bit for bit. A computed one must be as near to the truth in fp64
as PyTorch is in the same dtype, and rounding:  error(kernel) <= error(PyTorch) + 4 eps max|truth|.
Uninitialised memory is filled with NaN, upstream gradients differ from row to row, and everything runs twice.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """build(device, *arguments) gives outputs(impl), what the operation makes of its inputs, by name, and the truth:

    the same in fp64, None where it must be equal.
    """

    op: str
    name: str
    build: Callable[..., tuple[Callable[[str], dict[str, Tensor]], dict[str, Tensor] | None]]
    arguments: tuple = ()

    def run(self, device: torch.device) -> list["Finding"]:
        try:
            with _poisoned():
                outputs, truth = self.build(device, *self.arguments)
                ours, again, definition = outputs("triton"), outputs("triton"), outputs("torch")
        except Exception as error:  # a kernel that does not compile fails its case, not the others
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return [Finding(self.op, self.name, said, float("inf"), 0.0)]
        findings = []
        for name, tensor in ours.items():
            if not torch.equal(_bits(tensor), _bits(again[name])):
                findings.append(Finding(self.op, self.name, f"{name}, run twice", float("inf"), 0.0))
            exact = definition[name] if truth is None or name not in truth else truth[name].detach()
            error, allowed = _distance(tensor, exact), 0.0
            if exact is not definition[name] and exact.numel():
                scale = float(exact.abs().max())
                allowed = _distance(definition[name], exact) + 4 * torch.finfo(tensor.dtype).eps * scale
            findings.append(Finding(self.op, self.name, name, error, allowed))
        return findings


@dataclass(frozen=True)
class Finding:
    op: str
    case: str
    output: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Inside, torch.empty is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _distance(ours: Tensor, exact: Tensor) -> float:
    """Largest difference; infinite where shapes differ, NaN where one is."""
    if ours.shape != exact.shape:
        return float("inf")
    return float((ours.detach().double() - exact.detach().double()).abs().max()) if ours.numel() else 0.0
