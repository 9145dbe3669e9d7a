"""The Triton kernel of adamw.py: compact state updated and written through in one pass, one launch for a model."""

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from allo_kernels.compact import tensors
from allo_kernels.compact_triton import ENTRIES, WARPS, block_pointer, target_of
from allo_kernels.launching import launch, to_nearest
from allo_kernels.rounding_triton import stochastically

_FLAT = 4096  # entries per program where no weight is written, about as many as a block of weights has


@triton.jit
def _bias_correction(LOG2_BETA: tl.constexpr, step):
    """1 - beta^step; in fp64, because at beta 0.999 its first values would keep four digits in fp32."""
    return 1.0 - tl.exp2(tl.full((), LOG2_BETA, tl.float64) * step.to(tl.float64))


@triton.jit(do_not_specialize=["rounding_seed"])
def _masked_adamw_kernel(
    values,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    lr,
    eps,
    grad_scale,
    low,
    starts,
    weight,  # with low and starts, or None with them: no weight is written
    size,
    rounding_seed,  # None is a constant, and leaves the branch out
    beta1,
    beta1_rest,
    beta2,
    beta2_rest,
    one_minus_beta1,
    one_minus_beta2,
    weight_decay,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    DTYPE: tl.constexpr,
    TABLE: tl.constexpr,
    FLAT: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    step, lr, eps = tl.load(step), tl.load(lr).to(tl.float32), tl.load(eps).to(tl.float32)
    if grad_scale is not None:
        grad_scale = tl.load(grad_scale).to(tl.float32)
    step_size = (lr.to(tl.float64) / _bias_correction(LOG2_BETA1, step)).to(tl.float32)
    inverse_root = (1.0 / tl.sqrt(_bias_correction(LOG2_BETA2, step))).to(tl.float32)
    decay = lr * weight_decay
    if weight is not None:
        begin, last = tl.load(starts + block), tl.load(starts + block + 1)
        base = block_pointer(weight, block, DTYPE, TABLE)
    else:
        begin = block * FLAT
        last = tl.minimum(begin + FLAT, size)
    for first in range(begin, last, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < last
        g = tl.load(grad + entry, mask=inside, other=0.0).to(tl.float32)
        if grad_scale is not None:
            g *= grad_scale
        m, v = tl.load(exp_avg + entry, mask=inside, other=0.0), tl.load(exp_avg_sq + entry, mask=inside, other=0.0)
        # In fp32 beta2 is off by up to 3e-8, at each step again: of v at 0.999 that makes 3e-5. What it loses is added.
        m = m * beta1 + (m * beta1_rest + g * one_minus_beta1)
        v = v * beta2 + (v * beta2_rest + g * g * one_minus_beta2)
        p = tl.load(values + entry, mask=inside, other=0.0)
        # Not p (1 - decay): below 3e-8 that is p, and no weight would ever decay.
        p -= decay * p + step_size * m / (tl.sqrt(v) * inverse_root + eps)
        tl.store(exp_avg + entry, m, mask=inside)
        tl.store(exp_avg_sq + entry, v, mask=inside)
        tl.store(values + entry, p, mask=inside)
        if weight is not None:
            in_block = tl.load(low + entry, mask=inside, other=0)
            if rounding_seed is not None:
                p = stochastically(p, in_block, rounding_seed)
            tl.store(base + in_block.to(tl.int64), to_nearest(p, DTYPE), mask=inside)


def masked_adamw_(
    values, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, grad_scale, weight, positions, seed
) -> None:
    size = values.numel()
    if positions is None:
        blocks, low, starts, target, kind = -(-size // _FLAT), None, None, None, {"DTYPE": None, "TABLE": False}
    else:
        blocks, low, starts = positions.blocks, positions.low, positions.starts
        target, kind = target_of(weight, positions)
    scalars = [None if scalar is None else _on_device(scalar, values) for scalar in (step, lr, eps, grad_scale)]
    launch(
        _masked_adamw_kernel,
        (blocks,),
        *(values, grad, exp_avg, exp_avg_sq, *scalars, low, starts, target, size, seed),
        *(*_in_two(beta1), *_in_two(beta2), 1 - beta1, 1 - beta2, weight_decay),
        LOG2_BETA1=math.log2(beta1) if beta1 else -math.inf,
        LOG2_BETA2=math.log2(beta2) if beta2 else -math.inf,
        FLAT=_FLAT,
        ENTRIES=ENTRIES,
        num_warps=WARPS,
        **kind,
    )
    increment_version([values, exp_avg, exp_avg_sq, *(tensors(weight) if positions is not None else ())])


def _in_two(number: float) -> tuple[float, float]:
    """The nearest fp32, which is what a kernel's argument keeps, and what is left of the number."""
    (nearest,) = struct.unpack("f", struct.pack("f", number))
    return nearest, number - nearest


def _on_device(scalar: float | Tensor, like: Tensor) -> Tensor:
    """A 0-d tensor; making one of a number is a launch, not a copy, so nothing waits."""
    if isinstance(scalar, Tensor):
        return scalar
    return torch.full((), scalar, dtype=torch.float32, device=like.device)
