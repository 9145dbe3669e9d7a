"""The values of a policy as parameters of its model, for training loops that know only the model.

Such a loop clears, clips, logs, counts and (in DistributedDataParallel) reduces the gradients of `model.parameters()`,
moves the model, saves and loads its state. All of that reaches the values through this module, or is refused by it.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from allo_fast.config import UserError
from allo_fast.model.weights import VALUES
from allo_kernels import Positions, gather
from allo_kernels.rounding import rounded


class ValueParameters(nn.Module):
    """A submodule of the model, with the values and without a state: the model's state is its weights.

    values, weights, positions: by the name of the weight. on_load: called when a state was loaded into the weights.
    rounding_seed: by which values are rounded into the weights, as `scatter_` does.
    """

    def __init__(
        self,
        values: Mapping[str, nn.Parameter],
        weights: Mapping[str, nn.Parameter],
        positions: Mapping[str, Positions],
        on_load: Callable[[], None],
        rounding_seed: int | None,
    ):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name.replace(".", "/"), value)
        self._values, self._weights, self._positions, self._on_load = values, weights, positions, on_load
        self._rounding_seed = rounding_seed
        self._places = {(weight.device, weight.dtype) for weight in weights.values()}
        self.mark_written()

    def attach(self, model: nn.Module) -> None:
        """Takes the place of an earlier policy's."""
        model.add_module(VALUES, self)

    def mark_written(self) -> None:
        """The values as they are now lie in the weights."""
        for value in self._values.values():
            value.written_from = value.data_ptr()

    def check_written(self, name: str) -> None:
        """Raises UserError where another optimizer changed the values of a weight, or DeepSpeed put others there."""
        value = self._values[name]
        if value.written_from != value.data_ptr():
            raise UserError(
                f"SparsePolicy: the values of {name} were changed or replaced, but not in the model: train them with "
                "SparseAdamW(policy), alone or in DistributedDataParallel (not in DeepSpeed or FSDP), or call "
                "policy.write_back() after each update"
            )

    def _save_to_state_dict(self, *_) -> None:
        for name in self._values:
            self.check_written(name)

    @torch.no_grad()
    def _load_from_state_dict(self, *_) -> None:
        """The model's weights, which come before this module, were loaded: the values become what lies there now."""
        self._on_load()
        for name, value in self._values.items():
            weight, at = self._weights[name].data, self._positions[name]
            loaded = gather(weight, at)
            same = rounded(value, at.low, weight.dtype, self._rounding_seed) == loaded
            value.copy_(torch.where(same, value, loaded.float()))  # bits that it lacks stay

    def _apply(self, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> "ValueParameters":
        """What `.to(...)` and the like call. The values stay as they are; positions and moments would not follow."""
        for device, dtype in self._places:
            moved = convert(torch.empty(0, device=device, dtype=dtype))
            if (moved.device, moved.dtype) != (device, dtype):
                raise UserError(
                    f"SparsePolicy: its model is moved or cast from {device}, {dtype} to {moved.device}, "
                    f"{moved.dtype}; do that before the policy is made"
                )
        return self

    def _replicate_for_data_parallel(self):
        raise UserError("SparsePolicy: nn.DataParallel is not supported; start one process per device with torchrun")


def _mark_changed(optimizer: Optimizer, *_) -> None:
    """After a step of any optimizer but ours, what it changed is not in the weights."""
    if getattr(optimizer, "writes_back", False):
        return
    for group in optimizer.param_groups:
        for value in group["params"]:
            if hasattr(value, "written_from"):
                value.written_from = None


register_optimizer_step_post_hook(_mark_changed)
