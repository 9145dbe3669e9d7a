"""Where a training step happens: backward, clip, step, and the state that a resumed run needs."""

import json
import math
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import get_scheduler

from allo_fast.config import TrainConfig
from allo_fast.optim import SparseAdamW
from allo_fast.policy import DensePolicy, SparsePolicy


class LocalBackend:
    """One process, one device. protocol: release takes the older AdamW form and clips by the dense gradient's norm."""

    def __init__(
        self, policy: DensePolicy | SparsePolicy, config: TrainConfig, total_steps: int, protocol: str = "paper"
    ):
        self.policy, self.max_grad_norm = policy, config.max_grad_norm
        shared = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
        }
        if isinstance(policy, SparsePolicy):
            self.parameters = policy.values
            self.optimizer = SparseAdamW(policy, **shared, hf_eps=protocol == "release")
        else:
            self.parameters = dict(policy.model.named_parameters())
            self.optimizer = torch.optim.AdamW(self.parameters.values(), **shared, fused=True)
        warmup = math.ceil(total_steps * config.warmup_steps) if config.warmup_steps < 1 else int(config.warmup_steps)
        # A warm-up as long as the stage would leave its only learning rates at or near zero.
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.optimizer, min(warmup, total_steps - 1), total_steps
        )
        self.updated = False  # has any step moved the policy away from where it started?

    @property
    def learning_rate(self) -> float:
        """Of the coming step."""
        return self.scheduler.get_last_lr()[0]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> Tensor:
        """Clips, updates, clears the gradients; returns the gradient norm before clipping, 0-d fp32."""
        sparse = isinstance(self.optimizer, SparseAdamW)
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        dense = getattr(self.policy, "dense_gradients", {})
        measured = list(dense.values()) or (self.optimizer.gradients() if sparse else gradients)
        norm = torch.nn.utils.get_total_norm(measured).float()
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.updated |= self.learning_rate > 0
        if sparse:
            self.optimizer.step(grad_scale=scale)
        else:
            torch._foreach_mul_(gradients, scale)
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=False)
        for gradient in dense.values():
            gradient.zero_()
        return norm

    def optimizer_bytes(self) -> int:
        moments = [state[key] for state in self.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        return sum(moment.numel() * moment.element_size() for moment in moments)

    def save(self, path: Path, step: int) -> None:
        """One file with what is needed to go on after `step` steps; the frozen base is not part of it."""
        tensors = {f"values.{name}": value.detach() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            tensors |= {f"{key}.{name}": item for key, item in self.optimizer.state[value].items()}
        # A file cannot hold views of one vector, nor one step that all entries share.
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        found = {"step": step, "scheduler": self.scheduler.state_dict(), "updated": self.updated}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"progress": json.dumps(found)})
        os.replace(partial, path)

    @torch.no_grad()
    def load(self, path: Path) -> int:
        """Restores what `save` wrote; returns the number of steps done, 0 where there is no checkpoint."""
        if not path.is_file():
            return 0
        with safe_open(path, "pt", device=str(self.policy.model.device)) as file:
            tensors, found = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["progress"])
        for name, value in self.parameters.items():
            value.copy_(tensors[f"values.{name}"])
            state = self.optimizer.state[value]
            for key in (key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors):
                # Sparse state lies in flat vectors and is filled; dense state is not there before the first step.
                state[key] = state[key].copy_(tensors[f"{key}.{name}"]) if key in state else tensors[f"{key}.{name}"]
        if isinstance(self.policy, SparsePolicy):
            self.policy.write_back()
        self.scheduler.load_state_dict(found["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.updated = found["updated"]
        return found["step"]
