"""AdamW on compact state, written through into the resident weight."""

from torch import Tensor

from allo_kernels.compact import scatter_
from allo_kernels.dispatch import choose


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
    grad_scale: Tensor | None = None,
    weight: Tensor | None = None,
    positions: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One AdamW step (Loshchilov & Hutter, arXiv 1711.05101) on the selected entries, in place.

    values, exp_avg, exp_avg_sq: fp32 [K]; grad: [K], any float dtype, multiplied by `grad_scale`; step counts from 1.
    With `weight` and `positions` [K] the new values are also written, rounded to nearest, into
    `weight.view(-1)[positions]`. step, lr, eps and grad_scale may be 0-d tensors on the device: nothing waits for the
    host. Raises ValueError for shapes that differ, for state that is not fp32, and for a weight without positions.
    """
    for name, tensor in (("values", values), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if str(tensor.dtype) != "torch.float32":
            raise ValueError(f"{name}: expected torch.float32, got {tensor.dtype}")
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor.shape != values.shape:
            raise ValueError(f"{name}: expected shape {tuple(values.shape)}, got {tuple(tensor.shape)}")
    if (weight is None) != (positions is None):
        raise ValueError("weight and positions: expected both or neither")
    run = choose("masked_adamw_", impl, {"torch": _masked_adamw_torch}, cuda=values.is_cuda)
    run(values, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, grad_scale, weight, positions)


def _masked_adamw_torch(
    values, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, grad_scale, weight, positions
) -> None:
    grad = grad.float() if grad_scale is None else grad.float() * grad_scale
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    values.mul_(1 - lr * weight_decay)
    values.sub_(denominator.reciprocal_().mul_(exp_avg).mul_(lr / (1 - beta1**step)))
    if weight is not None:
        scatter_(weight, positions, values, impl="torch")
