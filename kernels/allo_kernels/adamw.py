"""AdamW on compact state, written through into the resident weights."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from allo_kernels.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_not_capturing,
    check_scalar,
    check_shape,
)
from allo_kernels.compact import check_entries, check_weights, scatter_torch_, tensors
from allo_kernels.dispatch import choose
from allo_kernels.positions import Positions
from allo_kernels.rounding import check_rounding_seed

_PART = 1 << 20  # entries whose scaled gradient is alive at once in PyTorch


@torch.no_grad()
def masked_adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float | Tensor,
    weight_decay: float,
    grad_scale: float | Tensor | None = None,
    weight: Tensor | Sequence[Tensor] | None = None,
    positions: Positions | None = None,
    rounding_seed: int | None = None,
    impl: str = "auto",
) -> None:
    """One AdamW step (Loshchilov & Hutter, arXiv 1711.05101) on the selected entries, in place.

        g = grad_scale grad     m = beta1 m + (1 - beta1) g     v = beta2 v + (1 - beta2) g^2
        p = (1 - lr weight_decay) p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    values (p), exp_avg (m), exp_avg_sq (v): fp32 [K]; grad: [K], bf16, fp16 or fp32; step counts from 1.
    With `weight` and `positions` the new values are also written into `weight.view(-1)[positions]`, rounded as by
    `scatter_` with this rounding_seed; weight may be the list of tensors that `positions` were concatenated for, and is
    then still written by the same launch; autograd sees it as `scatter_` says. step, lr, eps and grad_scale may be 0-d
    tensors on the device: nothing waits for the host, and a captured CUDA graph reads them anew (numbers stay what they
    were). The PyTorch definition does wait: RuntimeError while a graph is captured, as for the first call for a list of
    weights.
    Raises ValueError, naming the argument, for a wrong shape, dtype or device, state that is not contiguous, a number
    out of range, a weight without positions, and a rounding_seed for fp16 weights.
    """
    for name, tensor in (("values", values), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("grad", grad)):
        check_dtype(name, tensor, *(FLOATS if name == "grad" else (torch.float32,)))
        check_shape(name, tensor, (values.numel(),))
        check_device(name, tensor, values.device)
        check_contiguous(name, tensor)
    scalars = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2}
    for name, scalar in scalars.items():
        check_scalar(name, scalar, values.device, least=0)
    check_scalar("step", step, values.device, least=1)
    if grad_scale is not None:
        check_scalar("grad_scale", grad_scale, values.device)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not beta < 1:
            raise ValueError(f"{name}: expected a number below 1, got {beta}")
    if (weight is None) != (positions is None):
        raise ValueError("weight, positions: expected both or neither")
    if positions is not None:
        check_weights("weight", weight, positions)
        check_entries("values", values, positions)
    seed = check_rounding_seed(rounding_seed, () if weight is None else tensors(weight))
    run = choose("masked_adamw_", impl, _masked_adamw_torch_, "adamw_triton.masked_adamw_", values.device)
    state = (values, grad, exp_avg, exp_avg_sq)
    run(*state, step, lr, beta1, beta2, eps, weight_decay, grad_scale, weight, positions, seed)


def _masked_adamw_torch_(
    values, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, grad_scale, weight, positions, seed
) -> None:
    check_not_capturing("masked_adamw_ in PyTorch")
    before = torch.as_tensor(step, dtype=torch.float32, device=values.device) - 1
    lr = lr.float() if isinstance(lr, Tensor) else lr  # the only dtype that it reads on a device
    settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": float(eps), "weight_decay": weight_decay}
    for p, g, m, v in zip(*(tensor.split(_PART) for tensor in (values, grad, exp_avg, exp_avg_sq)), strict=True):
        g = g.float() if grad_scale is None else g.float() * grad_scale
        one_each = ([p], [g], [m], [v], [], [before.clone()])  # whose last it counts up
        adamw(*one_each, fused=True, amsgrad=False, maximize=False, **settings)
    increment_version([values, exp_avg, exp_avg_sq])  # torch's fused step does not tell autograd
    if weight is not None:
        scatter_torch_(weight, positions, values, seed)
