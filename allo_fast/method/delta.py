"""What training changed, without the base: per tensor, positions and values; and how both are stored."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from allo_fast.config import UserError
from allo_fast.model.weights import fingerprint, named_weights
from allo_kernels import Positions, scatter_


class Delta:
    """What training changed, without the base: per tensor, positions and the values there.

    stops: token ids at which the trained model's generation configuration stops; none: the base's.
    """

    def __init__(
        self, base: str, positions: dict[str, Positions], values: dict[str, Tensor], stops: tuple[int, ...] = ()
    ):
        self.base, self.positions, self.values, self.stops = base, positions, values, stops

    def save(self, path: Path) -> None:
        values = {f"{name}.values": value for name, value in self.values.items()}
        save_positions(path, self.positions, {"base": self.base, "stops": [*self.stops]}, values)

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Raises UserError when the file is not a delta."""
        try:
            positions, about, tensors = load_positions(path)
            values = {name: tensors[f"{name}.values"] for name in positions}
            return cls(about["base"], positions, values, tuple(about.get("stops", ())))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not a delta: {error}") from None

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.values.values())).dtype

    def merge_into(self, model: PreTrainedModel) -> None:
        """Sets values and stops into the base they were trained on. Raises UserError for any other model."""
        if (base := fingerprint(model)) != self.base:
            raise UserError(
                f"delta: made for the model {self.base[:12]}, got the model {base[:12]}; it goes with its run's base"
            )
        weights = named_weights(model)
        for name, at in self.positions.items():
            weight = weights[name].detach()
            scatter_(weight, at.to(weight.device), self.values[name].to(weight.device))
        if self.stops:
            model.generation_config.eos_token_id = [*self.stops]


def save_positions(path: Path, positions: dict[str, Positions], about: dict, others: dict[str, Tensor]) -> None:
    """A safetensors file of positions per tensor, of `others`, and of `about`, which goes into its metadata."""
    parts = {name: {"low": at.low, "starts": at.starts} for name, at in positions.items()}
    tensors = {f"{name}.{key}": part.cpu().contiguous() for name, pair in parts.items() for key, part in pair.items()}
    about = {**about, "sizes": {name: at.sizes[0] for name, at in positions.items()}}
    # One entry: safetensors writes several in an order that differs from file to file.
    save_file(tensors | others, path, {"about": json.dumps(about)})


def load_positions(path: str | Path) -> tuple[dict[str, Positions], dict, dict[str, Tensor]]:
    """Positions, `about` and all tensors. Raises OSError, SafetensorError, KeyError or ValueError for another file."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        about = json.loads((file.metadata() or {})["about"])
    if not isinstance(about, dict) or not isinstance(about["sizes"], dict):
        raise ValueError(f"metadata: expected an object with sizes, got {about!r:.80}")
    sizes = sorted(about["sizes"].items())
    positions = {n: Positions.checked(tensors[f"{n}.low"], tensors[f"{n}.starts"], size) for n, size in sizes}
    return positions, about, tensors
