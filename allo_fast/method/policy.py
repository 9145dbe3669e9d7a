"""One frozen base as policy and reference: they differ only in the selected entries.

    policy    = base with `values` set at `positions`      reference = base with `originals` set at `positions`

The base's storage holds the policy's values (rounded to its dtype). Training reads each weight through an alias whose
gradient is gathered at the selected positions, so that a dense gradient lives only while its layer is in backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from transformers import PreTrainedModel

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.data.batch import Batch
from allo_fast.method import sampled
from allo_fast.method.alias import Alias, gathered, install_reads, refuse_weight
from allo_fast.method.delta import Delta, begin
from allo_fast.method.group import Group
from allo_fast.method.parameters import ValueParameters
from allo_fast.method.rows import RowLinear, whole_rows
from allo_fast.method.selection import Selection
from allo_fast.model.generation import stop_tokens
from allo_fast.model.loading import say_what_is_not_trained
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import VALUES, fingerprint, named_weights, whole_weights
from allo_kernels import Positions, gather, scatter_, swap_
from allo_kernels.rounding import check_rounding_seed


class SparsePolicy:
    """Trains `selection`'s entries of `model` and nothing else; every weight of `model` is frozen.

    start: what an earlier stage changed in `model`, set into it here: policy and reference begin from that, rounded to
    the weights' dtype as this policy rounds, and entries that are trained again from the earlier stage's fp32 values.
    values: per tensor, an fp32 nn.Parameter [K], among `model.parameters()` but not in the model's state_dict, which
    stays that of a normal model; SparseAdamW's holds them. Raises UserError when one of both is of another model, and
    later where the model is moved or cast, loads the state of another one, or another optimizer changes the values.
    keep_dense_gradients: also add up every weight's dense gradient, in fp32 (for `clip: all`), at its full cost.
    rounding_seed: values are rounded into bfloat16 weights by chance, as by `scatter_`; None: to nearest. With that of
    `start` the policy begins from the very weights that the earlier stage left. float32 weights take the values.
    """

    autocast = None  # it computes in the dtype of its weights

    def __init__(
        self,
        model: PreTrainedModel,
        selection: Selection,
        start: Delta | None = None,
        *,
        keep_dense_gradients: bool = False,
        rounding_seed: int | None = None,
    ):
        selection.check(model)
        earlier = getattr(model._modules.get(VALUES), "trained_before", None)  # that of a policy before this one
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self._trained_before = trained if earlier is None else earlier
        self.model, weights = model, named_weights(model)
        self.rounding_seed = check_rounding_seed(rounding_seed, [*weights.values()])
        if start:
            start.check(selection.base)
        self._names, self.values, self._in_reference = {}, {}, False
        self.logps = ResponseLogps(model, self._head_entries)  # what it refuses is left as it is
        model.requires_grad_(False)
        self.base = begin(model, selection.base, start, self.rounding_seed)
        self.parameters = sum(weight.numel() for weight in weights.values())
        self.weights = {name: weights[name] for name in selection.names}
        self.groups = [self._group(dtype, selection) for dtype in {w.dtype: None for w in self.weights.values()}]
        self.positions, self.values = {}, {}
        for group in self.groups:
            parts = group.values.split(group.positions.counts)
            self.positions |= dict(zip(group.weights, group.positions.parts, strict=True))
            self.values |= {name: nn.Parameter(part) for name, part in zip(group.weights, parts, strict=True)}
        if start:
            for name, value in self.values.items():
                start.carry_into(value.detach(), name, self.positions[name])
        kept = weights.items() if keep_dense_gradients else ()
        self.dense_gradients = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in kept}
        self._names = {id(weight): name for name, weight in (weights if keep_dense_gradients else self.weights).items()}
        self._patterns: dict[str, sampled.Pattern] = {}  # of weights that only these get a gradient of
        self.loaded_alone = False  # did the model load a state, and the optimizer none since?
        self.adds_gradients = False  # straight to `value.grad`, past what may wait for it, as DistributedDataParallel
        own = (self.values, self.weights, self.positions, self._loaded, self.rounding_seed)
        self._value_parameters = ValueParameters(*own)
        self._value_parameters.trained_before = self._trained_before
        for module in model.modules():
            self._install(module)
        say_what_is_not_trained(model)
        self._value_parameters.attach(model)

    @property
    def selected(self) -> int:
        return sum(len(at) for at in self.positions.values())

    def response_logps(self, batch: Batch) -> Tensor:
        """[R, L] fp32, differentiable in `values`."""
        self._check_attached()
        return self.logps(batch)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the reference, bit for bit, and nothing has a gradient.

        A backward inside would read the reference's weights and raises RuntimeError; after it the weights are, bit for
        bit, those of before, and so are their versions: backward of an earlier forward is right, and runs.
        """
        self.check_current()
        with _unsafe_preserve_version_counter(tuple(self.weights.values())):
            self._swap()
            self._in_reference = True
            try:
                with torch.no_grad():
                    yield
            finally:
                self._swap()
                self._in_reference = False

    @torch.no_grad()
    def write_back(self) -> None:
        """Sets `values` into the base, for whoever changed them without SparseAdamW."""
        self.check_current()
        for name, value in self.values.items():
            weight = self.weights[name].detach()
            scatter_(weight, self.positions[name], value.detach(), rounding_seed=self.rounding_seed)
        self._value_parameters.mark_written()

    def release(self) -> PreTrainedModel:
        """The model as any other, with what was trained in its weights: nothing of this policy, which ends, is left.

        Its layers are of their own classes again, so that it can be copied and pickled; weights that trained before do.
        """
        self.check_current()
        for name in self.values:
            self._value_parameters.check_written(name)
        del self.model._modules[VALUES]
        for module in self.model.modules():
            install_reads(module, (), self._read)
        self.logps.release()
        for weight in self._trained_before:
            weight.requires_grad_()
        return self.model

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the live tensors, by kind."""
        gradients = [value.grad for value in self.values.values() if value.grad is not None]
        kinds = {
            "base": named_weights(self.model).values(),
            "positions": [group.positions for group in self.groups] + [*self._patterns.values()],
            "originals": [group.originals for group in self.groups],
            "values": self.values.values(),
            "gradients": gradients + [*self.dense_gradients.values()],
        }
        return {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in kinds.items()}

    def changed(self) -> int:
        """How many selected entries of the base differ from their originals; bfloat16 hides small updates."""
        count = 0
        for group in self.groups:
            parts = zip(group.data, group.positions.parts, group.originals.split(group.positions.counts), strict=True)
            count += sum(int((gather(weight, at) != before).sum()) for weight, at, before in parts)
        return count

    def check_current(self) -> None:
        """Raises UserError where the weights are not the policy's to change."""
        if self._in_reference:
            raise UserError("SparsePolicy: inside reference() the weights are the reference's; leave it first")
        self._check_attached()

    def _check_attached(self) -> None:
        if self.model._modules.get(VALUES) is not self._value_parameters:
            raise UserError("SparsePolicy: it was released, or its model has another policy since")

    def fingerprint(self) -> str:
        """Of its weights as they are; all are read only where they are not those that it began with."""
        return fingerprint(self.model) if self.changed() else self.base

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the policy, whole, one at a time; every rank iterates together."""
        return whole_weights(self.model)

    def trained(self) -> Iterator[tuple[str, Positions, Tensor]]:
        """Of every weight that trains the name, positions and fp32 values; every rank iterates together."""
        for name, value in self.values.items():
            yield name, self.positions[name], value.detach()

    def save_delta(self, path: str | Path, before: str | Path | None = None) -> None:
        """The trained entries, fp32, over the delta at `before` where the policy started from it; rank 0 writes."""
        positions, values = {}, {}
        for name, at, value in self.trained():
            if ranks.is_main():
                positions[name], values[name] = at.to("cpu"), value.to("cpu", copy=True)
        dtype, stops = str(self.model.dtype).removeprefix("torch."), tuple(sorted(stop_tokens(self.model)))

        def write() -> None:
            delta = Delta(self.base, dtype, positions, values, stops, self.rounding_seed)
            (delta.over(Delta.load(before)) if before else delta).save(path)

        ranks.on_main(write)

    def _group(self, dtype: torch.dtype, selection: Selection) -> Group:
        weights = {name: weight for name, weight in self.weights.items() if weight.dtype == dtype}
        return Group.of(weights, [selection.positions(name).to(self.model.device) for name in weights])

    def _swap(self) -> None:
        for group in self.groups:
            swap_(group.data, group.positions, group.originals)

    def _loaded(self) -> None:
        """The model loaded a state. Raises UserError when that was not one of this policy."""
        self.loaded_alone = True
        with self.reference():
            base = fingerprint(self.model)
        if base != self.base:
            raise UserError(
                f"load_state_dict: of another model or selection; without the selected entries it is the model "
                f"{base[:12]}, the policy's is {self.base[:12]}"
            )

    def _install(self, module: nn.Module) -> None:
        names = [name for name, weight in module._parameters.items() if id(weight) in self._names]
        few = self._without_dense_gradient(module)
        forward = {"forward": lambda module, inputs: self._forward(module, inputs, *few)} if few else {}
        install_reads(module, names, self._read, forward)

    def _without_dense_gradient(self, module: nn.Module) -> tuple | None:
        """What computes a layer whose weight never gets a dense gradient, and what it is told of it; or None."""
        weight = module._parameters.get("weight")
        name = self._names.get(id(weight))
        if name not in self.values or self.dense_gradients:
            return None
        at, linear = self.positions[name], sampled.is_plain_linear(module)
        if linear and (rows := whole_rows(at, module.in_features)) is not None:
            return RowLinear, rows
        if module is self.model.get_output_embeddings() or not sampled.pays(module, weight, at):
            return None  # log-probabilities do not call the head, which has its own way
        self._patterns[name] = pattern = sampled.Pattern.of(at, weight.shape)
        return sampled.SampledLinear if linear else sampled.SampledEmbedding, pattern, partial(self._sum, name)

    def _forward(self, module: nn.Module, inputs: Tensor, function: type[torch.autograd.Function], *told) -> Tensor:
        # A custom Function's backward would not know of autocast.
        if self._in_reference or not torch.is_grad_enabled() or torch.is_autocast_enabled(inputs.device.type):
            return sampled.plain_class(module).forward(module, inputs)
        weight = module._parameters["weight"]
        name = self._names.get(id(weight)) or refuse_weight()
        self._value_parameters.check_written(name)
        setting = module.bias if isinstance(module, nn.Linear) else module.padding_idx
        return function.apply(inputs, self.values[name], weight.detach(), setting, *told)

    def _read(self, weight: nn.Parameter) -> Tensor:
        if self._in_reference or not torch.is_grad_enabled():
            return weight
        if (name := self._names.get(id(weight))) is None:
            refuse_weight()
        if name in self.values:
            self._value_parameters.check_written(name)
        # A weight with nothing selected has an alias only for its dense gradient, and needs something differentiable.
        value = self.values[name] if name in self.values else torch.zeros(0, device=weight.device, requires_grad=True)
        return Alias.apply(value, weight, partial(self._take, name))

    def _take(self, name: str, gradient: Tensor) -> Tensor | None:
        """The gradient of a weight's values; None where it was added to what they have."""
        if name in self.dense_gradients:
            self.dense_gradients[name] += gradient
        if name not in self.values:
            return None
        at, gradients = self.positions[name], self._sum(name)
        if gradients is None:
            return gathered(at, gradient)
        if sampled.is_small(gradient):  # which has one block
            gradients += gradient.reshape(-1)[at.low.long()]
        else:
            gather(gradient.contiguous(), at, out=gradients, accumulate=True)
        return None

    def _sum(self, name: str) -> Tensor | None:
        """Where a gradient of a weight's values may be added; None where it must be returned to autograd."""
        return self.values[name].grad if self.adds_gradients else None

    def _head_entries(self, weight: nn.Parameter) -> tuple[Tensor, Tensor, Positions] | None:
        """Of the head's weight, whose dense gradient [V, D] is then never made; None where nothing of it trains."""
        name, frozen = self._names.get(id(weight)), self._in_reference or not torch.is_grad_enabled()
        if name not in self.values or self.dense_gradients or frozen:
            return None
        self._value_parameters.check_written(name)
        return weight, self.values[name], self.positions[name]
