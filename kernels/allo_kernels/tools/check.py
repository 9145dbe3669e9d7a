"""Every kernel against its definition, on whatever the machine has: a GPU, or Triton's interpreter.

A number that is only copied or counted must be equal bit for bit. A computed one must be as near to the truth in fp64
as PyTorch is in the same dtype, and rounding: `allowed_error` is the rule, for these cases and for the tests.
Uninitialised memory is filled with NaN, upstream gradients differ from row to row, and everything runs twice.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from allo_kernels.positions import Positions

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
_EPS = torch.finfo(FP32).eps


@dataclass(frozen=True)
class Exact:
    """An output in fp64. exponent: magnitudes of the largest logit and log-probability on the way, 0 without exp;

    logarithm: its error is the relative one of what it is the logarithm of; factors: what the factors of its products
    are rounded to, where that is less than the output's dtype.
    """

    value: Tensor
    exponent: float = 0.0
    logarithm: bool = False
    factors: torch.dtype | None = None


def allowed_error(pytorchs: Tensor, exact: Exact) -> float:
    """error(PyTorch) + 4 eps max|truth| + 16 eps of fp32 x exponent x max|truth|, or x 1 for a logarithm.

    error(PyTorch), in the same dtype, stands for what both do: round operands, sum products in some order.
    4 eps are eight roundings, and what a device's sqrt (1 ulp) and division (2 ulp) add. More comes from exp. Let M be
    the largest logit and R the largest log-probability, both as magnitudes, and eps that of fp32, two roundings.
        exp(x)      2 eps, and eps |x| for rounding log2(e) and x log2(e): a device has only the power of 2
        a logit     6 eps M: two divisions or products, tanh (2.4 eps where exp begins, below 1 in the polynomial), cap
                    and temperature as fp32
        lse         6 eps M of the logits, eps (R + 2) of exp, eps / 2 (M + R) of its sum with the maximum
        exp(z - lse)  all of these and eps (R + 2) of its own: eps (12.5 M + 2.5 R + 4), relative
    which 16 eps (M + R) and four of the roundings cover. The same goes for the sigmoid of a pair's margin, with the
    two rewards whose difference it is as logits. Where factors are rounded to fewer digits than a sum of their products
    keeps, both round by chance, each otherwise: one eps of theirs.
    """
    scale = float(exact.value.detach().abs().max())
    rounding = 4 * torch.finfo(pytorchs.dtype).eps * scale
    rounding += torch.finfo(exact.factors).eps * scale if exact.factors else 0.0
    return distance(pytorchs, exact.value) + rounding + 16 * _EPS * exact.exponent * (1 if exact.logarithm else scale)


@dataclass(frozen=True)
class Case:
    """build(device, *arguments) gives outputs(impl), what the operation makes of its inputs, by name, and the truth.

    The truth has those outputs that may differ; all others must be equal.
    """

    op: str
    name: str
    build: Callable[..., tuple[Callable[[str], dict[str, Tensor]], dict[str, Exact]]]
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
            exact, allowed = truth.get(name, Exact(definition[name])), 0.0
            if name in truth and tensor.numel():
                allowed = allowed_error(definition[name], exact)
            findings.append(Finding(self.op, self.name, name, distance(tensor, exact.value), allowed))
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


def distance(ours: Tensor, exact: Tensor) -> float:
    """Largest difference; infinite where shapes differ, NaN where one is."""
    if ours.shape != exact.shape:
        return float("inf")
    return float((ours.detach().double() - exact.detach().double()).abs().max()) if ours.numel() else 0.0


def drawing(device: torch.device, seed: int = 0) -> Callable[..., Tensor]:
    """Normal numbers of a shape and dtype, the same in every run on a device."""
    draw = torch.Generator(device).manual_seed(seed)
    return lambda *shape, dtype=FP32: torch.randn(*shape, generator=draw, device=device).to(dtype)


def selected(device: torch.device, sizes: tuple[int, ...], kind: str) -> Positions:
    draw, parts = torch.Generator(device).manual_seed(1), []
    share = {"none": 0.0, "ends": 0.0, "5%": 0.05, "all": 1.1}[kind]
    for size in sizes:
        mask = torch.rand(size, generator=draw, device=device) < share
        if kind == "ends" and size:
            mask[0] = mask[-1] = True
        parts.append(Positions.pack(mask.nonzero().squeeze(1), size))
    return Positions.cat(parts)
