"""PEFT's adapters of single weights, super-tuning and SHiRA: made of a delta, and a delta of them."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from allo_fast.config import UserError, first_line
from allo_fast.durable import appearing, as_any_file, check_room
from allo_fast.method.delta import Delta
from allo_fast.model.saving import check_new
from allo_fast.model.weights import fingerprint, named_weights
from allo_kernels import Positions, gather

ADAPTER = "adapter_config.json"
KINDS = "supertuning", "shira"
_TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_VALUES = {"supertuning": "supertuning_values", "shira": "shira_weight"}


@dataclass(frozen=True)
class _Change:
    """Of one linear layer's weight [out, in]: flat positions [K], ascending, and what is added to them, fp32 [K]."""

    layer: str
    shape: tuple[int, int]
    index: Tensor
    added: Tensor

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def of_length(self, length: int) -> tuple[Tensor, Tensor]:
        """Its positions and what is added, with as many of the first others, to which nothing is, as PEFT expects."""
        others = torch.ones(length, dtype=torch.bool)  # as many are enough
        others[self.index[self.index < length]] = False
        index = torch.cat([self.index, others.nonzero().flatten()[: length - len(self.index)]])
        order = index.argsort()
        return index[order].int(), torch.nn.functional.pad(self.added, (0, length - len(self.index)))[order]


def save_adapter(delta: Delta, base: PreTrainedModel, name: str | Path, kind: str, out: Path) -> tuple[int, int, float]:
    """Writes what `delta` changes of `base`, which it was trained on, as a folder for `PeftModel.from_pretrained`.

    name: by which PEFT finds the base. kind: one of KINDS. PEFT wants as many entries of every layer as the densest
    needs, of super-tuning by its share of the layer, of SHiRA by r (in + out); zeros fill up the others. Afterwards the
    base is the trained model. Returns how many weights it changes, how many PEFT makes another number than was trained,
    and by how much at most. Raises UserError for another base, where something else than linear layers changed, and
    where the folder exists.
    """
    check_new(out)
    delta.check(fingerprint(base))
    originals = {n: gather(weight.detach(), delta.positions[n]) for n, weight in _changed(delta, base)}
    delta.set_into(base)
    changes, missed, apart = [], 0, 0.0
    for n, weight in _changed(delta, base):
        before, after = originals[n], gather(weight.detach(), delta.positions[n])
        moved = before != after
        before, after, index = before[moved], after[moved], delta.positions[n].unpack()[moved]
        added = after.float() - before.float()
        if len(added):
            error = (_sum(before, added, kind).float() - after.float()).abs()
            missed, apart = missed + int(error.count_nonzero()), max(apart, error.max().item())
            changes.append(_Change(n.removesuffix(".weight"), tuple(weight.shape), index, added))
    if not changes:
        raise UserError(f"{delta.where}: it changes nothing of this model")
    linear = {n for n, module in base.named_modules() if isinstance(module, nn.Linear)}
    if others := [change.layer for change in changes if change.layer not in linear]:
        raise UserError(
            f"{delta.where}: {others[0]} (of {len(others)}) is no linear layer, and PEFT adapts no others by {kind}; "
            "train with locate.exclude, or `allo-fast merge` it"
        )
    settings, lengths = (_share_of if kind == "supertuning" else _rank_of)(changes)
    settings |= {"peft_type": kind.upper(), "task_type": "CAUSAL_LM", "base_model_name_or_path": str(name)}
    settings |= {"inference_mode": True, "target_modules": [change.layer for change in changes]}
    tensors = {}
    for change, length in zip(changes, lengths, strict=True):
        index, added = change.of_length(length)
        if kind == "shira":
            index = torch.stack([index // change.shape[1], index % change.shape[1]])
        tensors[f"{_PREFIX}{change.layer}.{_VALUES[kind]}"] = added
        tensors[f"{_PREFIX}{change.layer}.{kind}_indices"] = index
    check_room(out, sum(tensor.nbytes for tensor in tensors.values()))
    with appearing(out) as partial:
        partial.mkdir()
        save_file(tensors, partial / _TENSORS, {"format": "pt"})
        as_any_file(partial / _TENSORS)
        (partial / ADAPTER).write_text(json.dumps(settings, indent=2) + "\n")
    return sum(len(change.index) for change in changes), missed, apart


def _changed(delta: Delta, base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    weights = named_weights(base)
    return ((name, weights[name]) for name in delta.positions)


def _sum(before: Tensor, added: Tensor, kind: str) -> Tensor:
    """The weights that PEFT makes: it rounds what super-tuning adds to their dtype first, of SHiRA the sum alone."""
    return (before.float() + (added.to(before.dtype).float() if kind == "supertuning" else added)).to(before.dtype)


def _share_of(changes: list[_Change]) -> tuple[dict, list[int]]:
    """Super-tuning trains int(size (1 - sparsity)) entries of each layer."""
    sparsity = 1 - max(len(change.index) / change.size for change in changes)
    lengths = [0] * len(changes)
    while any(length < len(change.index) for length, change in zip(lengths, changes, strict=True)):
        lengths = [int(change.size * (1 - sparsity)) for change in changes]
        used, sparsity = sparsity, max(0.0, math.nextafter(sparsity, 0))
    return {"sparsity": used}, lengths


def _rank_of(changes: list[_Change]) -> tuple[dict, list[int]]:
    """SHiRA trains r (in + out) entries of each layer."""
    rank = max(-(-len(change.index) // sum(change.shape)) for change in changes)
    lengths = [rank * sum(change.shape) for change in changes]
    for change, length in zip(changes, lengths, strict=True):
        if length > change.size:
            raise UserError(f"shira: r would be {rank}, more than {change.layer} has; supertuning takes any number")
    return {"r": rank}, lengths


@dataclass(frozen=True)
class Adapter:
    """One of PEFT's, as `folder` holds it. kind: one of KINDS. base: what it says that it was trained on."""

    folder: Path
    kind: str
    base: str | None
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Raises UserError for a folder that is none of KINDS."""
        try:
            settings = json.loads((folder / ADAPTER).read_bytes())
            kind, base = str(settings["peft_type"]).lower(), settings.get("base_model_name_or_path")
            with safe_open(folder / _TENSORS, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{folder}: not an adapter of PEFT's in safetensors: {first_line(error)}") from None
        if kind not in KINDS:
            raise UserError(f"{folder}: {kind} is none of {', '.join(KINDS)}; merge it with PEFT")
        if kind == "shira" and settings.get("fan_in_fan_out"):
            raise UserError(f"{folder}: fan_in_fan_out: of weights that lie [in, out]; not read")
        return cls(folder, kind, base, tensors)


def delta_of(adapter: Adapter, base: PreTrainedModel) -> Delta:
    """The delta that makes `base` what PEFT makes it with the adapter, to the bit, without entries that add 0.

    Whether it is the adapter's base nobody knows. Raises UserError for an adapter that does not fit, or holds more:
    low-rank parts, whole modules, biases.
    """
    folder, kind, tensors = adapter.folder, adapter.kind, adapter.tensors
    weights = named_weights(base)
    values, indices = f".{_VALUES[kind]}", f".{kind}_indices"
    layers = sorted(name.removesuffix(values) for name in tensors if name.endswith(values))
    if others := sorted({*tensors} - {layer + end for layer in layers for end in (values, indices)}):
        raise UserError(f"{folder}: {others[0]} is more than {kind} adds to single weights; merge it with PEFT")
    positions, trained = {}, {}
    for layer in layers:
        name = layer.removeprefix(_PREFIX) + ".weight"
        if (weight := weights.get(name)) is None or weight.ndim != 2:
            raise UserError(f"{folder}: {layer} is no layer of this base, or tied to another")
        if layer + indices not in tensors:
            raise UserError(f"{folder}: it has no {layer}{indices}; save it with save_precomputed_indices=True")
        index, added = tensors[layer + indices], tensors[layer + values]
        if index.dtype not in (torch.int32, torch.int64) or not added.is_floating_point():
            raise UserError(f"{folder}: {layer}: positions of {index.dtype}, values of {added.dtype}; was it cast?")
        index, added = index.long(), added.float()
        if kind == "shira" and index.ndim == 2 and len(index) == 2:
            inside = bool((index[1] < weight.shape[1]).all() and (index >= 0).all())
            index = index[0] * weight.shape[1] + index[1] if inside else index[0].new_full((1,), -1)
        index, order = index.sort()
        if index.shape != added.shape or added.ndim != 1 or not added.isfinite().all():
            raise UserError(f"{folder}: {layer}: expected as many finite values as positions of this base's {name}")
        moves = (added := added[order]) != 0
        try:
            positions[name] = Positions.pack(index[moves], weight.numel())
        except ValueError as error:
            raise UserError(f"{folder}: {layer}: {error}") from None
        before = gather(weight.detach(), positions[name])
        trained[name] = _sum(before, added[moves], kind).float()
    if not sum(map(len, positions.values())):
        raise UserError(f"{folder}: it changes nothing")
    dtype = str(base.dtype).removeprefix("torch.")
    return Delta(fingerprint(base), dtype, positions, trained, where=str(folder))
