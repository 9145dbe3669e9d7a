"""Deltas on a live model: applied, scaled, stacked, swapped, and undone to the bit."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from allo_fast.errors import UserError, no_such
from allo_fast.method.adapters import ADAPTER
from allo_fast.method.delta import Delta, set_entries
from allo_fast.model.weights import VALUES, fingerprint, named_weights, size_of
from allo_kernels import Positions, gather

_LARGEST = 100  # scale, by which what training changed stays finite in any dtype


class LoadedDelta:
    """One delta of a model's; `load_delta` makes it. Whatever is applied or removed, the others stay as they are.

    One by itself makes the trained model, bit for bit. Several add up what they change, in the order in which they were
    loaded and rounded to the model's dtype after each; without any the model is its base, bit for bit.
    """

    def __init__(self, stack: "_Stack", delta: Delta, scale: float):
        self._stack, self._delta, self._scale, self._applied = stack, delta, scale, True
        self._originals = {name: _entries(stack.weights[name], at) for name, at in delta.positions.items()}

    @property
    def applied(self) -> bool:
        return self._applied

    @property
    def scale(self) -> float:
        """0 is the base, 1 what was trained; between, beyond and below them on the line through both."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        scale = _checked(scale)
        self._change(lambda: setattr(self, "_scale", scale))

    def apply(self) -> None:
        self._change(lambda: setattr(self, "_applied", True))

    def remove(self) -> None:
        """It stays at hand for `apply`."""
        self._change(lambda: setattr(self, "_applied", False))

    def swap(self, other: "LoadedDelta") -> None:
        """Removes this one and applies another of the same model."""
        if other._stack is not self._stack or other not in self._stack.deltas:
            raise UserError("swap: the other delta is not, or not any more, on this model")

        def change() -> None:
            self._applied, other._applied = False, True

        self._change(change)

    def unload(self) -> None:
        """Removes it for good, and frees what it holds."""
        self._change(lambda: self._stack.deltas.remove(self))
        self._applied, self._delta, self._originals = False, None, {}

    def _change(self, how: Callable[[], None]) -> None:
        if self not in self._stack.deltas:
            raise UserError("load_delta: this delta was unloaded")
        self._stack.change(how)

    def _set(self, alone: bool) -> None:
        """alone: what lies in its entries is the base's."""
        for name, at in self._delta.positions.items():
            weight = self._stack.weights[name]
            originals, values = (part.to(weight.device) for part in (self._originals[name], self._delta.values[name]))
            now = originals if alone else _entries(weight, at)
            if self._scale == 1 and (alone or torch.equal(now, originals)):
                set_entries(weight, at, values, self._delta.rounding_seed)
            else:
                set_entries(weight, at, now.float() + self._scale * (values - originals.float()))

    def _restore(self) -> None:
        for name, at in self._delta.positions.items():
            set_entries(self._stack.weights[name], at, self._originals[name])


def _checked(scale: float) -> float:
    """Raises UserError for what is no number, or would lead to infinities."""
    if not abs(scale) <= _LARGEST:
        raise UserError(f"scale: expected a number from {-_LARGEST} to {_LARGEST}, got {scale}")
    return float(scale)


def _entries(weight: Tensor, at: Positions) -> Tensor:
    """In the weight's dtype."""
    return gather(weight.detach(), at.to(weight.device))


@dataclass(eq=False)
class _Stack:
    """The deltas of one model. modules: its own; base: its fingerprint without them; stops: at which it then stops."""

    modules: dict[str, object]
    weights: dict[str, Tensor]
    generation: object  # its configuration
    base: str
    stops: int | list[int] | None
    deltas: list[LoadedDelta]

    def __post_init__(self):
        self.kinds = {name: (weight.dtype, weight.shape) for name, weight in self.weights.items()}

    @torch.no_grad()
    def change(self, how: Callable[[], None]) -> None:
        """Does what `how` does while the model is the base."""
        _check_untrained(self.modules)
        for name, (dtype, shape) in self.kinds.items():
            if (now := self.weights[name].dtype) != dtype:
                raise UserError(f"load_delta: {name} was cast from {dtype} to {now} since; cast it back")
            if self.weights[name].shape != shape:
                raise UserError(f"load_delta: {name} was resized since; the base is to be loaded anew")
        for delta in self.deltas:
            if delta.applied:
                delta._restore()
        try:
            how()
        finally:
            self.generation.eos_token_id = self.stops
            for number, delta in enumerate(delta for delta in self.deltas if delta.applied):
                delta._set(alone=number == 0)
                if delta._delta.stops and delta.scale:
                    self.generation.eos_token_id = [*delta._delta.stops]


def _check_untrained(modules: dict[str, object]) -> None:
    if VALUES in modules:
        raise UserError("load_delta: a SparsePolicy trains this model's weights; policy.release() ends that")


_stacks: WeakKeyDictionary[PreTrainedModel, _Stack] = WeakKeyDictionary()


def load_delta(model: PreTrainedModel, path: str | Path, scale: float = 1.0) -> LoadedDelta:
    """Sets a delta, a file that a stage wrote, into its live base `model`, between two of its forward passes, and gives
    what takes it out again. The first one of a model reads all its weights once, to know that it is the base.

    scale: from -100 to 100. Raises UserError for a file that is no delta, one of another model, a model that a
    SparsePolicy trains or whose weights lie in shares, and, later, one that was cast or resized meanwhile; it may be
    moved to another device.
    """
    if (Path(path) / ADAPTER).is_file():
        raise UserError(f"{path}: an adapter of PEFT's; `allo-fast convert` makes a delta of it")
    if not Path(path).is_file():
        raise UserError(f"{no_such(path)}; stages that train some of the weights leave a delta.safetensors")
    scale, delta, weights = _checked(scale), Delta.load(path), named_weights(model)
    _check_untrained(model._modules)
    if any(hasattr(weight, "ds_tensor") for weight in weights.values()):
        raise UserError("load_delta: the model lies in ZeRO-3 shares")
    if not (stack := _stacks.get(model)) or not stack.deltas:
        base, generation = fingerprint(model), model.generation_config
        stack = _Stack(model._modules, weights, generation, base, generation.eos_token_id, [])
    if (dtype := str(model.dtype).removeprefix("torch.")) != delta.dtype:
        raise UserError(f"{path}: made in {delta.dtype}, the model is in {dtype}; load it with dtype={delta.dtype!r}")
    delta.check(stack.base)
    for name, at in delta.positions.items():
        if name not in weights or size_of(weights[name]) != at.sizes[0]:
            raise UserError(f"{path}: {name} is not a tensor of the model, or has another size")
    stack.change(lambda: stack.deltas.append(LoadedDelta(stack, delta, scale)))
    _stacks[model] = stack
    return stack.deltas[-1]
