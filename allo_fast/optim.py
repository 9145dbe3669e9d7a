"""AdamW over the selected entries only, with the new values written into the base in the same pass."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from allo_fast.policy import SparsePolicy
from allo_kernels import masked_adamw_


class SparseAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) whose state is [K]: `exp_avg` and `exp_avg_sq` in fp32, there from construction.

    Element-wise equal to dense AdamW on the selected entries. hf_eps: the older Hugging Face form
    p -= lr sqrt(1-b2^t)/(1-b1^t) m/(sqrt(v) + eps), where eps is not corrected. A training loop that clips and clears
    only the model's own parameters, as transformers.Trainer does, leaves both to this optimizer: max_grad_norm clips
    by the norm of all values' gradients, clear_gradients drops them after the update.
    """

    def __init__(
        self,
        policy: SparsePolicy,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hf_eps: bool = False,
        max_grad_norm: float | None = None,
        clear_gradients: bool = False,
    ):
        self.policy, self.hf_eps = policy, hf_eps
        self.max_grad_norm, self.clear_gradients = max_grad_norm, clear_gradients
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(list(policy.values.values()), defaults)
        for value in policy.values.values():
            self.state[value] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }
        self._names = {value: name for name, value in policy.values.items()}

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every entry that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._clip_scale() if self.max_grad_norm is not None else None
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    self._update(value, group, scale)
        if self.clear_gradients:
            self.zero_grad()
        return loss

    def _clip_scale(self) -> Tensor:
        gradients = [value.grad for group in self.param_groups for value in group["params"] if value.grad is not None]
        return (self.max_grad_norm / (torch.nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0)

    def _update(self, value: Tensor, group: dict, grad_scale: Tensor | None) -> None:
        state, name = self.state[value], self._names[value]
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        masked_adamw_(
            value.data,
            value.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=step,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            # Dividing eps by the same correction as sqrt(v) turns one form into the other.
            eps=group["eps"] / (1 - beta2**step) ** 0.5 if self.hf_eps else group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
            weight=self.policy.weights[name].data,
            positions=self.policy.positions[name],
        )
