"""What training changed, without the base: per tensor, positions and fp32 values; and how both are stored."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.durable import load_tensors, save_tensors
from allo_fast.errors import no_such
from allo_fast.model.generation import stop_tokens
from allo_fast.model.weights import fingerprint, named_weights, size_of
from allo_kernels import Positions, scatter_
from allo_kernels.positions import SPAN, blocks_of
from allo_kernels.rounding import check_rounding_seed, rounded

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Delta:
    """What training changed in the model `base` (its fingerprint), which lies in `dtype`.

    values: fp32 [K], as they were trained; in the model they are rounded to the weight's dtype. stops: token ids at
    which the trained model's generation configuration stops; none: the base's. rounding_seed: by which bfloat16 weights
    were rounded by chance, and are again; None: to nearest. where: the file it came from, for errors.
    """

    base: str
    dtype: str
    positions: dict[str, Positions]
    values: dict[str, Tensor]
    stops: tuple[int, ...] = ()
    rounding_seed: int | None = None
    where: str = "delta"

    def save(self, path: str | Path) -> None:
        values = {f"{name}.values": value for name, value in self.values.items()}
        about = {"base": self.base, "dtype": self.dtype, "stops": [*self.stops], "rounding_seed": self.rounding_seed}
        save_positions(path, self.positions, about, values)

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Raises UserError when the file is not there, not a delta, or a damaged one."""
        if not Path(path).is_file():
            raise UserError(no_such(path))
        try:
            positions, about, tensors = load_positions(path)
            values = {name: tensors[f"{name}.values"] for name in positions}
            delta = cls(
                about["base"],
                about["dtype"],
                positions,
                values,
                tuple(about["stops"]),
                about["rounding_seed"],
                str(path),
            )
            delta._check()
        except KeyError as error:
            raise UserError(f"{path}: not a delta: it has no {error}") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a delta: {str(error).removeprefix(f'{path}: ')}") from None
        return delta

    def check(self, base: str) -> None:
        """Raises UserError when it was made for another model than that of this fingerprint."""
        if base != self.base:
            raise UserError(
                f"{self.where}: made for the model {self.base[:12]}, got the model {base[:12]}; it goes with its run's "
                "base"
            )

    def merge_into(self, model: PreTrainedModel) -> None:
        """Makes the base it was trained on the trained model, bit for bit. Raises UserError for any other model.

        Of a model in ZeRO-3 shares each rank sets what lies in its own; every rank calls it together.
        """
        self.check(fingerprint(model))
        self.set_into(model)

    def set_into(self, model: PreTrainedModel) -> None:
        """`merge_into` a model that is known to be the base."""
        weights = named_weights(model)
        for name, at in self.positions.items():
            if name not in weights or size_of(weights[name]) != at.sizes[0]:
                raise UserError(f"{self.where}: {name} is not a tensor of the model, or has another size")
            set_entries(weights[name], at, self.values[name], self.rounding_seed)
        if self.stops and {*self.stops} != stop_tokens(model):
            model.generation_config.eos_token_id = [*self.stops]

    def carry_into(self, values: Tensor, name: str, at: Positions) -> None:
        """Sets in `values` [K], of the tensor `name` at `at`, those that this delta has, as fp32 as they are here."""
        if not len(self.positions.get(name, ())):
            return
        trained, selected = self.positions[name].unpack(), at.to("cpu").unpack()
        places = torch.searchsorted(trained, selected).clamp_(max=len(trained) - 1)
        both = trained[places] == selected
        values[both.to(values.device)] = self.values[name][places[both]].to(values.device)

    def over(self, before: "Delta") -> "Delta":
        """Of both, over the base of `before`, out of which that one made this one's; where both are, this one's."""
        positions, values = {**before.positions}, {**before.values}
        for name, at in self.positions.items():
            positions[name], values[name] = at, self.values[name]
            if name in before.positions:
                parts = [(delta.positions[name].unpack(), delta.values[name]) for delta in (before, self)]
                index, places = torch.cat([part for part, _ in parts]).unique(return_inverse=True)
                merged = torch.empty(len(index))
                for place, (_, part) in zip(places.split([len(part) for part, _ in parts]), parts, strict=True):
                    merged[place] = part
                positions[name], values[name] = Positions.pack(index, at.sizes[0]), merged
        return replace(self, base=before.base, dtype=before.dtype, positions=positions, values=values)

    def _check(self) -> None:
        """Raises ValueError, TypeError where what was read cannot be a delta."""
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {_DTYPES}, got {self.dtype!r}")
        if not all(isinstance(token, int) and token >= 0 for token in self.stops):
            raise ValueError(f"stops: expected token ids, got {self.stops!r:.80}")
        check_rounding_seed(self.rounding_seed, [torch.empty(0, dtype=getattr(torch, self.dtype))])
        for name, at in self.positions.items():
            value = self.values[name]
            if value.dtype != torch.float32 or value.shape != (len(at),):
                raise ValueError(
                    f"{name}: expected {len(at)} values in float32, got {tuple(value.shape)} in {value.dtype}"
                )
            if not value.isfinite().all():
                raise ValueError(f"{name}: a value is NaN or infinite")


def begin(model: PreTrainedModel, base: str, start: Delta | None, rounding_seed: int | None) -> str:
    """The fingerprint of what a policy begins from: `model`, whose fingerprint is `base`, with `start` set into it.

    All entries of a policy are rounded by its own seed, whichever stage trained them: one delta makes them all again.
    Raises UserError where start was made for another model.
    """
    if start is None:
        return base
    start.check(base)
    replace(start, rounding_seed=rounding_seed).set_into(model)
    return fingerprint(model)


def set_entries(weight: Tensor, at: Positions, values: Tensor, rounding_seed: int | None = None) -> None:
    """Sets `values` [K] into a weight, rounded as by `scatter_`; of one in ZeRO-3 shares, into this rank's share alone.

    What chance makes of a value depends on its place in the whole weight, whoever holds that.
    """
    if not hasattr(weight, "ds_tensor"):
        scatter_(weight.detach(), at.to(weight.device), values.to(weight.device), rounding_seed=rounding_seed)
        return
    begin, part = ranks.share(weight)
    first = begin // SPAN
    for entries, index in at.chunks(first, blocks_of(begin + len(part))):
        index += first * SPAN - begin
        inside = (index >= 0) & (index < len(part))
        here = rounded(values[entries], at.low[entries], part.dtype, rounding_seed)[inside]
        part[index[inside].to(part.device)] = here.to(part.device)


def save_positions(path: str | Path, positions: dict[str, Positions], about: dict, others: dict[str, Tensor]) -> None:
    """A safetensors file of positions per tensor, of `others`, and of `about`, which goes into its metadata."""
    parts = {name: {"low": at.low, "starts": at.starts} for name, at in positions.items()}
    tensors = {f"{name}.{key}": part.cpu().contiguous() for name, pair in parts.items() for key, part in pair.items()}
    about = {**about, "sizes": {name: at.sizes[0] for name, at in positions.items()}}
    save_tensors(Path(path), tensors | others, about)


def load_positions(path: str | Path) -> tuple[dict[str, Positions], dict, dict[str, Tensor]]:
    """Positions, `about` and all tensors. Raises Damaged, KeyError, TypeError or ValueError for another file."""
    tensors, about = load_tensors(Path(path))
    if not isinstance(about["sizes"], dict) or not isinstance(about["base"], str):
        raise ValueError(f"metadata: expected sizes of tensors and a base, got {about!r:.80}")
    if not about["sizes"]:
        raise ValueError("metadata: it names no tensor")
    sizes = sorted(about["sizes"].items())
    positions = {n: Positions.checked(tensors[f"{n}.low"], tensors[f"{n}.starts"], size) for n, size in sizes}
    return positions, about, tensors
