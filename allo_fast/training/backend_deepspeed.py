"""A training step on many devices: the same interface as LocalBackend, with DeepSpeed ZeRO underneath.

Only what trains is given to DeepSpeed to reduce, shard and gather: of a resident SparsePolicy its values, never the
base. Clipping happens inside the optimizer that DeepSpeed drives, in fp64, so that the number of ranks does not show.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from allo_fast import ranks
from allo_fast.config import TrainConfig
from allo_fast.data.batch import Batch
from allo_fast.method.dense import DensePolicy
from allo_fast.method.optim import ClippedAdamW, SparseAdamW, exceeds
from allo_fast.method.policy import SparsePolicy
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import size_of
from allo_fast.training.backend import (
    MOMENTS,
    adamw_settings,
    largest,
    load_progress,
    make_scheduler,
    save_progress,
)
from allo_fast.training.zero import Zero


class DeepSpeedBackend:
    """Every rank calls every method together. zero.stage 0-2: `policy` lies whole on every rank; 3: in shares."""

    def __init__(self, policy: DensePolicy | SparsePolicy, config: TrainConfig, total_steps: int, zero: Zero):
        self.policy, self.zero = policy, zero
        self.sparse = isinstance(policy, SparsePolicy)
        self.parameters = policy.values if self.sparse else dict(policy.model.named_parameters())
        self.optimizer = self._make_optimizer(config)
        trainable = sum(size_of(value) for value in self.parameters.values())
        self.engine, *_ = deepspeed.initialize(
            model=_Module(policy, whole=zero.sharded or not self.sparse),
            optimizer=self.optimizer,
            config=zero.engine_config(trainable),
            dist_init_required=False,
        )
        self._start_state()
        if policy.logps.findings is None:
            self.engine(None)
        if self.sparse and zero.sharded:
            policy.free_gathered = self.engine.empty_partition_cache
        self.scheduler = make_scheduler(self.optimizer, config, total_steps)
        self.updated = False
        self.largest = largest(policy.model)
        self.exceeds = torch.tensor(False)

    @property
    def learning_rate(self) -> float:
        """Of the coming step."""
        return self.scheduler.get_last_lr()[0]

    def response_logps(self, batch: Batch) -> Tensor:
        return self.engine(batch)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """last: no more of this step's losses follow on this rank. Losses of all ranks add up."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * ranks.world_size())  # DeepSpeed averages over ranks

    def step(self, accepts: Callable[[Tensor], bool]) -> None:
        """As LocalBackend.step. Of gradients that are not finite DeepSpeed asks nobody, and makes no update."""
        moves, norms = self.learning_rate > 0, []

        def asked(norm: Tensor) -> bool:
            norms.append(norm)
            accepted = accepts(norm)
            self.updated |= accepted and moves
            return accepted

        self.optimizer.accepts = asked
        self.engine.step()
        if not norms:
            accepts(torch.tensor(torch.nan))
        if self.sparse and self.zero.stage:
            self.policy.write_back()
        elif self.sparse:
            self.optimizer.zero_grad()  # puts back the flat gradients that DeepSpeed let go of
        self.scheduler.step()
        self.exceeds = exceeds(self.parameters.values(), self.largest)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight as it is trained, whole, one at a time; every rank iterates together."""
        return self.policy.full_weights()

    def state_bytes(self) -> dict[str, int]:
        """Bytes beyond the policy's own on this rank, by kind; `master` is DeepSpeed's second copy of what trains."""
        state = self.optimizer.state
        moments = sum(entry[key].nbytes for entry in state.values() for key in MOMENTS)
        return {"moments": moments, "master": sum(share.nbytes for share in state) if self.zero.stage else 0}

    def save(self, path: Path, step: int, about: dict) -> None:
        """As LocalBackend.save: one file that fits any number of ranks and any stage; rank 0 writes it."""
        tensors = {}
        for name, value in self.parameters.items():
            for key in ("values", *MOMENTS):
                full = self._read(value, key)
                if ranks.is_main():  # at stage 0 it is no copy, and may be a view
                    tensors[f"{key}.{name}"] = full.cpu() if self.zero.stage else full.cpu().clone()
            tensors[f"step.{name}"] = next(iter(self.optimizer.state.values()))["step"].clone()
        ranks.on_main(lambda: save_progress(path, tensors, step, self.scheduler, self.updated, about))

    @torch.no_grad()
    def load(self, path: Path) -> dict:
        """As LocalBackend.load."""
        read, progress = load_progress(path, "cpu", self.scheduler)
        if self.zero.sharded:  # what is gathered between steps would not be gathered anew
            self.engine.empty_partition_cache()
        self.updated = progress["updated"]
        for name, value in self.parameters.items():
            for key in ("values", *MOMENTS):
                self._write(value, key, read(f"{key}.{name}").to(self.policy.model.device))
        for state in self.optimizer.state.values():
            state["step"].copy_(read(f"step.{name}"))
        if self.sparse:
            self.policy.write_back()
        return progress

    def close(self) -> None:
        """Frees everything that DeepSpeed holds; the policy cannot compute afterwards."""
        close_engine(self.engine)

    def _make_optimizer(self, config: TrainConfig) -> torch.optim.Optimizer:
        settings = {**adamw_settings(config), "max_grad_norm": config.max_grad_norm}
        if self.sparse and self.zero.stage == 0:
            return SparseAdamW(self.policy, **settings)
        return ClippedAdamW(self.parameters.values(), across_ranks=self.zero.stage > 0, **settings)

    def _start_state(self) -> None:
        """DeepSpeed replaced what the optimizer updates by this rank's flat share of it."""
        if self.zero.stage == 0:
            if not self.sparse:
                self.optimizer.start_state(self.parameters.values())
            return
        inner = self.engine.optimizer
        shares = inner.fp32_partitioned_groups_flat if self.zero.sharded else inner.single_partition_of_fp32_groups
        if self.sparse and not self.zero.sharded:
            self.policy.groups = [replace(group, values=None) for group in self.policy.groups]
            self.policy.write_back()  # from where DeepSpeed put the values
        self.optimizer.start_state(shares)
        if not self.zero.sharded:
            lazy_init_hp_params_optimizer_state(inner.bit16_groups[0], shares[0], self.optimizer.state)

    def _read(self, value: nn.Parameter, key: str) -> Tensor:
        """All of a value or of its moment, on every rank."""
        if self.zero.stage == 0:
            return value.detach() if key == "values" else self.optimizer.state[value][key]
        full = safe_get_full_fp32_param(value) if key == "values" else safe_get_full_optimizer_state(value, key)
        return full.view(getattr(value, "ds_shape", value.shape))

    def _write(self, value: nn.Parameter, key: str, full: Tensor) -> None:
        if self.zero.stage == 0:
            (value if key == "values" else self.optimizer.state[value][key]).copy_(full)
        elif self.zero.sharded:
            part = value.ds_tensor.ds_numel
            padded = full.new_zeros(part * ranks.world_size())  # the last rank's share may be longer than the tensor
            padded[: full.numel()] = full.view(-1)
            share = padded.narrow(0, part * ranks.rank(), part)
            if key == "values":
                safe_set_local_fp32_param(value, share)
                value.ds_tensor.copy_(share)
            else:
                safe_set_local_optimizer_state(value, share, key)
        elif key == "values":
            safe_set_full_fp32_param(value, full)
            value.data.copy_(full)
        else:
            safe_set_full_optimizer_state(value, full, key)


@contextmanager
def frozen_engine(module: nn.Module) -> Iterator[nn.Module]:
    """A module whose parameters are ZeRO-3 shards, ready to compute and never to train, until the context ends.

    Raises UserError where it is ResponseLogps of a model that is refused.
    """
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine = deepspeed.initialize(model=module, config=config, dist_init_required=False)[0]
    try:
        if isinstance(module, ResponseLogps) and module.findings is None:
            engine(None)
        yield engine
    finally:
        close_engine(engine)


def differentiable(engine: nn.Module) -> Callable[[Batch], Tensor]:
    """What a frozen engine computes, with a graph for backward, which its own call refuses without an optimizer."""

    def compute(batch: Batch) -> Tensor:
        engine._forward_prologue((batch,), {})
        logps = engine.module(batch)
        engine._forward_epilogue()
        return logps

    return compute


def close_engine(engine: nn.Module) -> None:
    """Lets go of an engine's memory, which DeepSpeed otherwise keeps for as long as the process lives."""
    engine.destroy()
    modules = set(engine.module.modules())  # activation checkpointing leaves more than the engine's own there
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in modules]
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):  # a cache of all its instances' results, and so of them
                cell.cell_contents.cache_clear()


class _Module(nn.Module):
    """What DeepSpeed sees. whole: all of the policy's modules; otherwise only the values that train."""

    def __init__(self, policy: DensePolicy | SparsePolicy, whole: bool):
        super().__init__()
        self.compute, self.examine = policy.response_logps, policy.logps.examine
        if whole:
            self.logps = policy.logps
        else:
            self.values = nn.ParameterList(policy.values.values())

    def forward(self, batch: Batch | None) -> Tensor | None:
        """Without a batch it examines the model, for only here DeepSpeed gathers what is read outside its module."""
        return self.examine() if batch is None else self.compute(batch)
