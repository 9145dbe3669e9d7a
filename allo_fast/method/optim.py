"""AdamW over the selected entries only, with the new values written into the base in the same pass; and over all."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.method.policy import SparsePolicy
from allo_fast.model.weights import as_bytes
from allo_kernels import masked_adamw_

_PART = 1 << 20  # entries that are fp64 at once


def total_norm(gradients: Sequence[Tensor], *, across_ranks: bool = False) -> Tensor:
    """The norm of all gradients as one vector, 0-d fp32; across_ranks: every rank has a share of them.

    Squares are summed in fp64, so that neither their order nor the number of ranks shows in the result.
    """
    parts = [part for gradient in gradients for part in gradient.reshape(-1).split(_PART)]
    total = torch.stack([torch.linalg.vector_norm(part.double()).square() for part in parts]).sum()
    return (ranks.add_up(total) if across_ranks else total).sqrt().float()


def clip_scale(norm: Tensor, max_grad_norm: float) -> Tensor:
    """What gradients are multiplied by; torch.nn.utils.clip_grad_norm_'s rule."""
    return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)


def exceeds(values: Iterable[Tensor], largest: float) -> Tensor:
    """Whether one of this rank's share of `values` is NaN, or larger than `largest`: bool, 0-d, on their device."""
    parts = [part for _, part in map(ranks.share, values) if part.numel()]  # without what ZeRO-3 fills shares up with
    bounds = [bound for part in parts for bound in part.aminmax()]
    return ~(torch.stack(bounds).abs().max() <= largest) if bounds else torch.tensor(False)


class ClippedAdamW(torch.optim.AdamW):
    """torch's fused AdamW that clips by the norm of all gradients and clears nothing.

    across_ranks: every rank has a share of the gradients, as under ZeRO. accepts: asked with the norm before an update;
    where it says no there is none.
    """

    def __init__(self, params, *, max_grad_norm: float, across_ranks: bool = False, **settings):
        super().__init__(params, fused=True, **settings)
        self.max_grad_norm, self.across_ranks = max_grad_norm, across_ranks
        self.accepts: Callable[[Tensor], bool] = lambda norm: True

    def start_state(self, values: Iterable[Tensor]) -> None:
        """Moments of zero for `values`, so that a checkpoint can fill them before the first step.

        The caller's to call: under ZeRO `values` are this rank's share, and moments of all would be too many.
        """
        for value in values:
            moments = {key: torch.zeros_like(value) for key in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32, device=value.device)
            self.state[value] = {"step": step, **moments}

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        gradients = [value.grad for value in group["params"] if value.grad is not None]
        self.grad_norm = total_norm(gradients, across_ranks=self.across_ranks)
        if self.accepts(self.grad_norm):
            torch._foreach_mul_(gradients, clip_scale(self.grad_norm, self.max_grad_norm))
            super().step()


class SparseAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) whose state is [K]: `exp_avg` and `exp_avg_sq` in fp32, there from construction.

    Element-wise equal to dense AdamW on the selected entries. hf_eps: the older Hugging Face form
    p -= lr sqrt(1-b2^t)/(1-b1^t) m/(sqrt(v) + eps), where eps is not corrected. max_grad_norm: clips by the norm of all
    gradients, for a loop that does not; `accepts` as ClippedAdamW's. state_dict also holds the policy's fp32 values,
    and loading it sets them.
    """

    writes_back = True  # into the base, in the same pass

    def __init__(
        self,
        policy: SparsePolicy,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hf_eps: bool = False,
        max_grad_norm: float | None = None,
    ):
        self.policy, self.hf_eps, self.max_grad_norm = policy, hf_eps, max_grad_norm
        self.accepts: Callable[[Tensor], bool] = lambda norm: True
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(list(policy.values.values()), defaults)
        policy.loaded_alone = False
        device = policy.groups[0].values.device
        self._step = torch.zeros((), dtype=torch.float32, device=device)  # on the device: nothing waits to read it
        self._flat = [_Flat(*(torch.zeros_like(group.values) for _ in range(3))) for group in policy.groups]
        self._views = {
            policy.values[name]: _Flat(*parts)
            for group, flat in zip(policy.groups, self._flat, strict=True)
            for name, *parts in zip(group.weights, *(t.split(group.positions.counts) for t in flat), strict=True)
        }
        for value, view in self._views.items():
            self.state[value] = {"step": self._step, "exp_avg": view.exp_avg, "exp_avg_sq": view.exp_avg_sq}
        self.gradients()

    @torch.no_grad()
    def step(self, closure=None, *, grad_scale: Tensor | None = None):
        """One update of every entry; one without a gradient counts as having a gradient of zero.

        grad_scale: 0-d tensor that gradients are multiplied by in the same pass, for a caller that clips.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.policy.check_current()
        gradients, settings = self.gradients(), self.param_groups[0]
        if self.policy.loaded_alone:
            raise UserError(
                "SparseAdamW: the model loaded a state, but not the optimizer its own, which holds the fp32 values and "
                "moments: resume where both were saved, or make a new SparseAdamW to start from that model"
            )
        if self.max_grad_norm is not None:
            if grad_scale is not None:
                raise ValueError("grad_scale: this optimizer clips by itself; construct it with max_grad_norm=None")
            self.grad_norm = total_norm(gradients)
            if not self.accepts(self.grad_norm):
                return loss
            grad_scale = clip_scale(self.grad_norm, self.max_grad_norm)
        self._step += 1
        beta1, beta2 = settings["betas"]
        # Dividing eps by the same correction as sqrt(v) turns one form into the other.
        eps = settings["eps"] / (1 - beta2 ** self._step.double()).sqrt() if self.hf_eps else settings["eps"]
        for group, flat in zip(self.policy.groups, self._flat, strict=True):
            masked_adamw_(
                group.values,
                *flat,
                step=self._step,
                lr=settings["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=settings["weight_decay"],
                grad_scale=grad_scale,
                weight=group.data,
                positions=group.positions,
                rounding_seed=self.policy.rounding_seed,
            )
        return loss

    def gradients(self) -> list[Tensor]:
        """All gradients as flat fp32 vectors, one a dtype of the base; those that lie elsewhere are copied there."""
        for value, view in self._views.items():
            if value.grad is None:
                view.grad.zero_()
            elif value.grad.data_ptr() != view.grad.data_ptr():
                view.grad.copy_(value.grad)
            value.grad = view.grad
        return [flat.grad for flat in self._flat]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets every gradient to zero; the flat vectors that they lie in stay, whatever `set_to_none` says."""
        for flat in self._flat:
            flat.grad.zero_()
        for value, view in self._views.items():
            value.grad = view.grad

    def state_dict(self) -> dict:
        """torch's, with `values` by name and `identity`, which says of which base, selection and rounding they are."""
        values = {name: value.detach() for name, value in self.policy.values.items()}
        extra = {"values": values, "identity": self._identity, "loaded_alone": self.policy.loaded_alone}
        return {**super().state_dict(), **extra}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Sets the state, and the values in the policy and its base. Raises UserError for one of another policy."""
        self.policy.check_current()
        if state_dict.get("identity") != self._identity:
            raise UserError("state_dict: not of a SparseAdamW with this base, selection and rounding_seed")
        self._check_shapes(state_dict)
        super().load_state_dict(state_dict)
        for value, view in self._views.items():
            loaded = self.state[value]
            view.exp_avg.copy_(loaded["exp_avg"])
            view.exp_avg_sq.copy_(loaded["exp_avg_sq"])
            self._step.copy_(loaded["step"])
            self.state[value] = {"step": self._step, "exp_avg": view.exp_avg, "exp_avg_sq": view.exp_avg_sq}
        for name, value in self.policy.values.items():
            value.copy_(state_dict["values"][name])
        self.policy.write_back()
        self.policy.loaded_alone = state_dict["loaded_alone"]  # accelerate loads what it just took from here

    @cached_property
    def _identity(self) -> str:
        """SHA-256 over the policy's base, its selected positions and how its values are rounded."""
        digest = hashlib.sha256(self.policy.base.encode())
        for group in self.policy.groups:
            digest.update(" ".join(group.weights).encode())
            digest.update(as_bytes(group.positions.low))
            digest.update(as_bytes(group.positions.starts))
        if self.policy.rounding_seed is not None:
            digest.update(f"rounding_seed {self.policy.rounding_seed}".encode())
        return digest.hexdigest()

    def _check_shapes(self, state_dict: dict) -> None:
        """Raises UserError where a value or moment is missing, or has another shape than here."""
        (group,) = state_dict["param_groups"]
        for number, (name, value) in zip(group["params"], self.policy.values.items(), strict=True):
            entries = {**state_dict["state"].get(number, {}), "value": state_dict["values"].get(name)}
            for key in ("value", "exp_avg", "exp_avg_sq"):
                if getattr(entries.get(key), "shape", None) != value.shape:
                    raise UserError(f"state_dict: {key} of {name}: expected shape {tuple(value.shape)}")


class _Flat(NamedTuple):
    """Of all entries of one group, or the views of one tensor's: fp32 [K] each."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
