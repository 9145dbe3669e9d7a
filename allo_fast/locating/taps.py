"""Gradients of some of a frozen model's weights, added up as its layers run backward.

Nothing else gets one: backward stops below the lowest of these weights, and no other product is made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from allo_fast.locating.windows import Piece
from allo_fast.method.alias import Alias, install_reads
from allo_fast.model.weights import named_weights, size_of


class Taps:
    """Reads every weight under `module` until it is closed; `model` names them, and none of its own has a gradient."""

    def __init__(self, model: nn.Module, module: nn.Module):
        self._module = module
        self._names = {id(weight): name for name, weight in named_weights(model.requires_grad_(False)).items()}
        self._sums: dict[str, list[tuple[Piece, Tensor]]] = {}
        self._on_read: Callable[[str], None] = lambda name: None
        for part in module.modules():
            install_reads(part, [name for name, w in part._parameters.items() if id(w) in self._names], self._read)

    @contextmanager
    def open(self, pieces: Sequence[Piece], device: torch.device) -> Iterator[list[Tensor]]:
        """Inside, a backward adds the gradient of each piece to its sum, fp32 [entries], which is zero at first."""
        sums = list(torch.zeros(sum(piece.size for piece in pieces), device=device).split([p.size for p in pieces]))
        for piece, total in zip(pieces, sums, strict=True):
            self._sums.setdefault(piece.name, []).append((piece, total))
        try:
            yield sums
        finally:
            self._sums.clear()

    @contextmanager
    def watch(self, on_read: Callable[[str], None]) -> Iterator[None]:
        """Inside, the name of every weight that is read goes to `on_read`."""
        self._on_read, before = on_read, self._on_read
        try:
            yield
        finally:
            self._on_read = before

    def close(self) -> None:
        for part in self._module.modules():
            install_reads(part, [], self._read)

    def _read(self, weight: nn.Parameter) -> Tensor:
        name = self._names[id(weight)]
        self._on_read(name)
        gathered = weight.numel() == size_of(weight)  # else it is asked for, as by ZeRO-3, and not computed with
        if name not in self._sums or not gathered or not torch.is_grad_enabled():
            return weight
        differentiable = torch.zeros(0, device=weight.device, requires_grad=True)
        return Alias.apply(differentiable, weight, partial(self._take, name))

    def _take(self, name: str, gradient: Tensor) -> None:
        flat = gradient.reshape(-1)
        for piece, total in self._sums[name]:
            total += flat[piece.begin : piece.end].to(total.device)
