"""One frozen base as policy and reference: they differ only in the selected entries.

    policy    = base with `values` set at `positions`      reference = base with `originals` set at `positions`

The base's storage holds the policy's values (rounded to its dtype). Training reads each weight through an alias whose
gradient is gathered at the selected positions, so that a dense gradient lives only while its layer is in backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from allo_fast.config import UserError
from allo_fast.data.batch import Batch
from allo_fast.logps import ResponseLogps
from allo_fast.models import fingerprint, named_weights
from allo_kernels import gather, scatter_, swap_

if TYPE_CHECKING:
    from allo_fast.selection import Selection


class SparsePolicy:
    """Trains `selection`'s entries of `model` and nothing else; every weight of `model` is frozen.

    values: per tensor, an fp32 nn.Parameter [K]. Raises UserError when the selection was made for another model.
    keep_dense_gradients: also accumulate every weight's dense gradient (for `clip: all`), at its full cost.
    """

    def __init__(self, model: PreTrainedModel, selection: "Selection", *, keep_dense_gradients: bool = False):
        selection.check(model)
        self.model = model.requires_grad_(False)
        self.base = selection.base
        self.parameters = sum(weight.numel() for weight in model.parameters())
        weights = named_weights(model)
        self.weights = {name: weights[name] for name in selection.names}
        self.positions = {name: selection.positions(name).to(model.device) for name in selection.names}
        self.originals = {name: gather(self.weights[name].data, at) for name, at in self.positions.items()}
        self.values = {n: nn.Parameter(held.to(torch.float32, copy=True)) for n, held in self.originals.items()}
        self.dense_gradients = {n: torch.zeros_like(w) for n, w in weights.items()} if keep_dense_gradients else {}
        self._names = {id(weight): name for name, weight in (weights if keep_dense_gradients else self.weights).items()}
        self._in_reference = False
        for module in model.modules():
            self._install(module)
        self.logps = ResponseLogps(model)

    def response_logps(self, batch: Batch) -> Tensor:
        """[R, L] fp32, differentiable in `values`."""
        return self.logps(batch)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the reference, bit for bit, and nothing has a gradient."""
        assert not self._in_reference, "reference() inside reference()"
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
        for name, value in self.values.items():
            scatter_(self.weights[name], self.positions[name], value)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the live tensors, by kind."""
        gradients = [value.grad for value in self.values.values() if value.grad is not None]
        kinds = {
            "base": self.model.parameters(),
            "positions": self.positions.values(),
            "originals": self.originals.values(),
            "values": self.values.values(),
            "gradients": gradients + [*self.dense_gradients.values()],
        }
        return {kind: sum(t.numel() * t.element_size() for t in tensors) for kind, tensors in kinds.items()}

    def changed(self) -> int:
        """How many selected entries of the base differ from their originals; bfloat16 hides small updates."""
        found = ((gather(self.weights[name].data, at), self.originals[name]) for name, at in self.positions.items())
        return sum(int((now != before).sum()) for now, before in found)

    def save_delta(self, path: Path, before: Path | None = None) -> None:
        """The trained entries, over `before` (the delta that made this base out of an earlier one) when given."""
        delta = Delta.load(before) if before else Delta(self.base, {}, {})
        weights = named_weights(self.model)
        names = sorted({*self.positions, *delta.positions})
        empty = torch.empty(0, dtype=torch.int32)
        both = {n: [self.positions.get(n, empty).cpu(), delta.positions.get(n, empty)] for n in names}
        positions = {name: torch.cat(parts).unique() for name, parts in both.items()}
        values = {n: gather(weights[n].data, at.to(weights[n].device)).cpu() for n, at in positions.items()}
        Delta(delta.base, positions, values).save(path)

    def _swap(self) -> None:
        for name, weight in self.weights.items():
            swap_(weight.data, self.positions[name], self.originals[name])

    def _install(self, module: nn.Module) -> None:
        """Whoever reads a training weight as an attribute gets its alias; `_parameters` stays as it is."""
        plain = getattr(type(module), "_without_aliases", type(module))
        mine = [name for name, weight in module._parameters.items() if id(weight) in self._names]
        reads = {name: property(lambda module, name=name: self._read(module._parameters[name])) for name in mine}
        held = {"_without_aliases": plain, "__module__": plain.__module__, **reads}
        module.__class__ = type(plain.__name__, (plain,), held) if mine else plain

    def _read(self, weight: nn.Parameter) -> Tensor:
        if self._in_reference or not torch.is_grad_enabled():
            return weight
        name = self._names[id(weight)]
        # A weight with nothing selected has an alias only for its dense gradient, and needs something differentiable.
        value = self.values[name] if name in self.values else torch.zeros(0, device=weight.device, requires_grad=True)
        return _Alias.apply(value, weight, self.positions.get(name), self.dense_gradients.get(name))


class DensePolicy:
    """Trains every weight of `model` in float32; the rival, the warm-up and the rewriter.

    autocast: the dtype that matrix products run in; None for float32.
    """

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None = None):
        self.model = model.requires_grad_(True)
        self.autocast = autocast
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self.logps = ResponseLogps(model)

    def response_logps(self, batch: Batch) -> Tensor:
        """[R, L] fp32, differentiable in the model's weights."""
        enabled = self.autocast is not None
        with torch.autocast(self.model.device.type, self.autocast, enabled=enabled):
            return self.logps(batch)

    def state_bytes(self) -> dict[str, int]:
        weights = list(self.model.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        kinds = {"base": weights, "gradients": gradients}
        return {kind: sum(t.numel() * t.element_size() for t in tensors) for kind, tensors in kinds.items()}


class _Alias(torch.autograd.Function):
    """The weight itself, as a function of the values that already lie in it: d/d values = dense gradient gathered."""

    @staticmethod
    def forward(ctx, values, weight, positions, dense_gradient):
        ctx.positions, ctx.dense_gradient = positions, dense_gradient
        return weight.detach()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.dense_gradient is not None:
            ctx.dense_gradient += gradient
        if ctx.positions is None:
            return gradient.new_zeros(0, dtype=torch.float32), None, None, None
        return gather(gradient.contiguous(), ctx.positions).float(), None, None, None


class Delta:
    """What training changed, without the base: per tensor, sorted positions and the values there."""

    def __init__(self, base: str, positions: dict[str, Tensor], values: dict[str, Tensor]):
        self.base, self.positions, self.values = base, positions, values

    def save(self, path: Path) -> None:
        parts = {f"{name}.positions": at for name, at in self.positions.items()}
        parts |= {f"{name}.values": value for name, value in self.values.items()}
        save_file(parts, path, {"base": self.base})

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        try:
            with safe_open(path, "pt") as file:
                parts, base = {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {})["base"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path}: not a delta: {error}") from None
        positions = {k.removesuffix(".positions"): v for k, v in parts.items() if k.endswith(".positions")}
        return cls(base, positions, {name: parts[f"{name}.values"] for name in positions})

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.values.values())).dtype

    def merge_into(self, model: nn.Module) -> None:
        """Sets the values into the base they were trained on. Raises UserError for any other model."""
        if (found := fingerprint(model)) != self.base:
            raise UserError(f"delta: made for the model {self.base[:12]}, got the model {found[:12]}")
        weights = named_weights(model)
        for name, at in self.positions.items():
            weight = weights[name].data
            scatter_(weight, at.to(weight.device), self.values[name].to(weight.device))
