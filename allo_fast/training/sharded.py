"""SparsePolicy whose base is sharded by ZeRO-3: its shards never change, values are set after every gather.

    gathered weight = all-gather(shards);  policy: values set at positions, in forward and again in backward;
    reference: nothing set

Values and positions are parameters of the modules that read the weight, so DeepSpeed shards, gathers and releases them
with it; of the values it also reduces the gradients and steps them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from allo_fast.config import UserError
from allo_fast.method.alias import Alias, install_reads
from allo_fast.method.delta import Delta, begin
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.loading import say_what_is_not_trained
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import divide, held_here, named_weights, size_of, whole
from allo_kernels import Positions, gather, scatter_
from allo_kernels.rounding import check_rounding_seed, rounded

linear = torch.ops.aten.linear  # torch.nn.functional.linear as it was: DeepSpeed puts its own there, which rounds twice


@dataclass(frozen=True, eq=False)
class Entries:
    """The selected entries of one weight. weight, values, low: parameters in shares, whole where they were gathered."""

    weight: nn.Parameter
    values: nn.Parameter  # fp32 [K]
    low: nn.Parameter  # uint8 [2 K]: the bytes of Positions.low; gloo and NCCL gather no uint16
    starts: Tensor
    rounding_seed: int | None  # by which `set` rounds

    @classmethod
    def of(
        cls, name: str, weight: nn.Parameter, at: Positions, start: Delta | None, rounding_seed: int | None
    ) -> "Entries":
        at = at.to(weight.device)
        with whole(weight):
            values = nn.Parameter(gather(weight.data, at).float())
        if start:
            start.carry_into(values.detach(), name, at)
        low = nn.Parameter(at.low.view(torch.uint8), requires_grad=False)
        divide(values, low)
        return cls(weight, values, low, at.starts, rounding_seed)

    def positions(self) -> Positions:
        """Where `low` is here."""
        return Positions(self.low.data.view(torch.uint16), self.starts, (size_of(self.weight),), (self.count,))

    @property
    def count(self) -> int:
        return size_of(self.values)

    def set(self) -> Tensor:
        """The gathered weight, the parameter itself, with the values set into it; or a copy of it."""
        weight = self.weight
        # A small weight stays gathered for the reference to see, and a single rank gathers nothing: not ours to write.
        if weight.ds_persist or weight.data_ptr() == weight.ds_tensor.data_ptr():
            weight = weight.detach().clone()
        self.write(weight.data)
        return weight

    def write(self, weight: Tensor) -> None:
        """Sets the values, gathered, into the whole weight."""
        scatter_(weight, self.positions(), self.values.data, rounding_seed=self.rounding_seed)

    def gather(self, gradient: Tensor) -> Tensor:
        """Of a dense gradient the selected entries -> fp32 [K]."""
        out = torch.empty(self.count, dtype=torch.float32, device=gradient.device)
        return gather(gradient.contiguous(), self.positions(), out=out)


class ShardedPolicy(SparsePolicy):
    """Trains `selection`'s entries of a model for DeepSpeedBackend at stage 3, which must be given it before it runs.

    The same interface as SparsePolicy. Raises UserError when selection or start was made for another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        selection: Selection,
        start: Delta | None = None,
        *,
        rounding_seed: int | None = None,
    ):
        selection.check(model)
        self.model = model.requires_grad_(False)
        self.every_weight = weights = named_weights(model)
        self.rounding_seed = check_rounding_seed(rounding_seed, [*weights.values()])
        self.base = begin(model, selection.base, start, self.rounding_seed)
        self.parameters = sum(map(size_of, weights.values()))
        self.weights = {name: weights[name] for name in selection.names}
        self.entries = {
            name: Entries.of(name, weight, selection.positions(name), start, self.rounding_seed)
            for name, weight in self.weights.items()
        }
        self.values = {name: entries.values for name, entries in self.entries.items()}
        self.dense_gradients = {}
        self._by_weight = {id(entries.weight): entries for entries in self.entries.values()}
        self.free_gathered: Callable[[], None] = lambda: None  # DeepSpeedBackend sets it
        say_what_is_not_trained(model)
        self._in_reference = True  # while a model that is still whole is tried, as it is
        self.logps = ResponseLogps(model, self._head_entries)
        self._in_reference = False
        for module in self.logps.modules():
            self._install(module)
        if head := self._by_weight.get(id(self.logps.head._parameters["weight"])):
            self.logps.head.register_forward_hook(lambda module, inputs, logps: _SetAgain.apply(logps, head))

    @property
    def selected(self) -> int:
        return sum(entries.count for entries in self.entries.values())

    def release(self) -> PreTrainedModel:
        raise UserError("SparsePolicy.release: the model lies in ZeRO-3 shares; save it, and load what was saved")

    def _check_attached(self) -> None:
        """DeepSpeed has the model, and no other policy takes it."""

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the reference, bit for bit, and nothing has a gradient."""
        assert not self._in_reference, "reference() inside reference()"
        self.free_gathered()
        self._in_reference = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.free_gathered()
            self._in_reference = False

    def write_back(self) -> None:
        """Nothing: values are set whenever a weight is gathered."""

    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds between steps, by kind."""
        all_entries = self.entries.values()
        kinds = {
            "base": self.every_weight.values(),
            "positions": [entries.low for entries in all_entries],
            "values": self.values.values(),
        }
        shares = {kind: sum(held_here(weight).nbytes for weight in kinds[kind]) for kind in kinds}
        return {**shares, "positions": shares["positions"] + sum(entries.starts.nbytes for entries in all_entries)}

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the policy, whole, one at a time; every rank iterates together."""
        for name, weight in self.every_weight.items():
            with whole(weight):
                yield name, self._policy_weight(name) if name in self.entries else weight.data

    def changed(self) -> int:
        """How many selected entries differ from the base's, in its dtype."""
        count = 0
        for entries in self.entries.values():
            with whole(entries.weight, entries.values, entries.low):
                at = entries.positions()
                before = gather(entries.weight.data, at)
                now = rounded(entries.values.data, at.low, before.dtype, self.rounding_seed)
                count += int((now != before).sum())
        return count

    def trained(self) -> Iterator[tuple[str, Positions, Tensor]]:
        """As SparsePolicy's; the values are gathered, the base is not."""
        for name, entries in self.entries.items():
            with whole(entries.values, entries.low):
                yield name, entries.positions(), entries.values.data

    def _policy_weight(self, name: str) -> Tensor:
        """A copy: what was gathered may be in use elsewhere."""
        entries = self.entries[name]
        weight = entries.weight.data.clone()
        with whole(entries.values, entries.low):
            entries.write(weight)
        return weight

    def _install(self, module: nn.Module) -> None:
        """Gives a module the entries of its weights; linear layers set them themselves, other readers get an alias."""
        by_name = {name: entries for name, w in module._parameters.items() if (entries := self._by_weight.get(id(w)))}
        for name, entries in by_name.items():
            module.register_parameter(f"{name}_values", entries.values)
            module.register_parameter(f"{name}_positions", entries.low)
        methods = {}
        if "weight" in by_name and type(module).forward is nn.Linear.forward:
            entries = by_name["weight"]
            methods["forward"] = lambda module, hidden: self._linear(module, hidden, entries)

        def read(weight: nn.Parameter) -> Tensor:
            # Who reads a weight outside its module, as Mamba does, makes DeepSpeed gather it by looking it up, and so
            # what belongs to it.
            for name in by_name:
                _ = module._parameters[f"{name}_values"], module._parameters[f"{name}_positions"]
            return self._read(weight)

        install_reads(module, by_name, read, methods)

    def _linear(self, module: nn.Linear, hidden: Tensor, entries: Entries) -> Tensor:
        if self._in_reference:
            return linear(hidden, entries.weight, module.bias)
        return _SetLinear.apply(hidden, entries.values, module.bias, entries)

    def _read(self, weight: nn.Parameter) -> Tensor:
        if self._in_reference or weight.numel() != size_of(weight):  # not gathered: a question, not a computation
            return weight
        entries = self._by_weight[id(weight)]
        return Alias.apply(entries.values, entries.set(), entries.gather)

    def _head_entries(self, weight: nn.Parameter) -> tuple[Tensor, Tensor, Positions] | None:
        entries = self._by_weight.get(id(weight))
        if entries is None or self._in_reference:
            return None
        return entries.set(), entries.values, entries.positions()  # `_SetAgain` sees to what backward gathers anew


class _SetLinear(torch.autograd.Function):
    """hidden @ weight.T + bias with the values set, in forward and backward; keeps the gathered weight in neither."""

    @staticmethod
    def forward(ctx, hidden: Tensor, values: Tensor, bias: Tensor | None, entries: Entries) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.entries = entries
        return linear(hidden, entries.set(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (hidden,) = ctx.saved_tensors
        d_hidden = upstream @ ctx.entries.set() if ctx.needs_input_grad[0] else None
        d_weight = upstream.flatten(0, -2).T @ hidden.flatten(0, -2)
        d_bias = upstream.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return d_hidden, ctx.entries.gather(d_weight), d_bias, None


class _SetAgain(torch.autograd.Function):
    """Passes through; before what precedes it runs backward, sets the values into the weight gathered anew."""

    @staticmethod
    def forward(ctx, logps: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        return logps.view_as(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        ctx.entries.set()
        return upstream, None
