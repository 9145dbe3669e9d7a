"""Where a training step happens: backward, clip, step, and the state that a resumed run needs."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler

from allo_fast.config import TrainConfig
from allo_fast.data.batch import Batch
from allo_fast.durable import about_of, open_tensors, save_tensors
from allo_fast.method.dense import DensePolicy
from allo_fast.method.optim import ClippedAdamW, SparseAdamW, clip_scale, exceeds, total_norm
from allo_fast.method.policy import SparsePolicy

MOMENTS = ("exp_avg", "exp_avg_sq")


class LocalBackend:
    """One process, one device. protocol: release takes the older AdamW form for a SparsePolicy; what is clipped is the
    policy's to say."""

    def __init__(
        self, policy: DensePolicy | SparsePolicy, config: TrainConfig, total_steps: int, protocol: str = "paper"
    ):
        self.policy, self.max_grad_norm = policy, config.max_grad_norm
        if isinstance(policy, SparsePolicy):
            self.parameters = policy.values
            self._trained = [group.values for group in policy.groups]
            self.optimizer = SparseAdamW(policy, **adamw_settings(config), hf_eps=protocol == "release")
            policy.adds_gradients = True  # nothing else waits for them here
        else:
            self.parameters = {name: w for name, w in policy.model.named_parameters() if w.requires_grad}
            self._trained = list(self.parameters.values())
            self.optimizer = ClippedAdamW(self._trained, max_grad_norm=config.max_grad_norm, **adamw_settings(config))
            self.optimizer.start_state(self._trained)
        self.scheduler = make_scheduler(self.optimizer, config, total_steps)
        self.updated = False  # has any step moved the policy away from where it started?
        self.largest = largest(policy.model)
        self.exceeds = torch.tensor(False)  # is a value not finite, or too large for its weight? 0-d, on the device

    @property
    def learning_rate(self) -> float:
        """Of the coming step."""
        return self.scheduler.get_last_lr()[0]

    def response_logps(self, batch: Batch) -> Tensor:
        return self.policy.response_logps(batch)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """last: no more of this step's losses follow."""
        loss.backward()

    def step(self, accepts: Callable[[Tensor], bool]) -> None:
        """Clips, updates, clears the gradients.

        accepts: told the gradient norm before clipping, 0-d fp32, it says whether there is an update.
        """
        moves = self.learning_rate > 0

        def asked(norm: Tensor) -> bool:
            accepted = accepts(norm)
            self.updated |= accepted and moves
            return accepted

        if isinstance(self.optimizer, SparseAdamW):
            self._sparse_step(asked)
        else:
            self.optimizer.accepts = asked
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.exceeds = exceeds(self._trained, self.largest)

    def _sparse_step(self, accepts: Callable[[Tensor], bool]) -> None:
        dense = list(self.policy.dense_gradients.values())
        norm = total_norm(dense or self.optimizer.gradients())
        if accepts(norm):
            self.optimizer.step(grad_scale=clip_scale(norm, self.max_grad_norm))
        for gradient in dense:
            gradient.zero_()

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight as it is trained, whole, one at a time."""
        return self.policy.full_weights()

    def state_bytes(self) -> dict[str, int]:
        """Bytes beyond the policy's own, by kind."""
        return {"moments": sum(state[key].nbytes for state in self.optimizer.state.values() for key in MOMENTS)}

    def close(self) -> None:
        """Nothing but the policy holds memory."""

    def save(self, path: Path, step: int, about: dict) -> None:
        """One file with what is needed to go on after `step` steps, and `about`; the frozen base is not part of it."""
        tensors = {f"values.{name}": value.detach() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            tensors |= {f"{key}.{name}": item for key, item in self.optimizer.state[value].items()}
        # A file cannot hold views of one vector, nor one step that all entries share; nor has a device room for both.
        tensors = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
        save_progress(path, tensors, step, self.scheduler, self.updated, about)

    @torch.no_grad()
    def load(self, path: Path) -> dict:
        """Restores what `save` wrote, of either backend; returns its `about`, with `step`."""
        read, progress = load_progress(path, self.policy.model.device, self.scheduler)
        self.updated = progress["updated"]
        for name, value in self.parameters.items():
            value.copy_(read(f"values.{name}"))
            for key, tensor in self.optimizer.state[value].items():
                tensor.copy_(read(f"{key}.{name}"))
        if isinstance(self.policy, SparsePolicy):
            self.policy.write_back()
        return progress


def adamw_settings(config: TrainConfig) -> dict:
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }


def make_scheduler(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LRScheduler:
    warmup = math.ceil(total_steps * config.warmup_steps) if config.warmup_steps < 1 else int(config.warmup_steps)
    # A warm-up as long as the stage would leave its only learning rates at or near zero.
    return get_scheduler(config.lr_scheduler_type, optimizer, min(warmup, total_steps - 1), total_steps)


def learning_rates(config: TrainConfig, total_steps: int) -> list[float]:
    """Of each step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    scheduler, rates = make_scheduler(optimizer, config, total_steps), []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def largest(model: PreTrainedModel) -> float:
    """The largest value that every weight of the model can take."""
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}  # not where values lie
    return min(torch.finfo(dtype).max for dtype in dtypes)


def save_progress(
    path: Path, tensors: dict[str, Tensor], step: int, scheduler: LRScheduler, updated: bool, about: dict
) -> None:
    progress = {"step": step, "scheduler": scheduler.state_dict(), "updated": updated}
    save_tensors(path, {**tensors, "rng": torch.get_rng_state()}, about | progress)


def load_progress(
    path: Path, device: torch.device | str, scheduler: LRScheduler
) -> tuple[Callable[[str], Tensor], dict]:
    """What reads a tensor by its name, and what `save_progress` was told; of a file that was checked.

    The scheduler and torch's generator go on from there.
    """
    file = open_tensors(path, device, check=False)
    progress = about_of(file)
    scheduler.load_state_dict(progress["scheduler"])
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    torch.set_rng_state(file.get_tensor("rng").cpu())
    return file.get_tensor, progress
