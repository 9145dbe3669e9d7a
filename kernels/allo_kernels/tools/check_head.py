"""Cases of `token_logps`: odd sizes, and each tile that is launched on a device, in sizes that take many of them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from allo_kernels import head_row_gradient, token_logps
from allo_kernels.tools.check import BF16, FP16, FP32, NAMES, Case, Exact, drawing, selected


@dataclass(frozen=True)
class HeadCase:
    """capability: run the tiles of such a device; None for those of the device itself, or the interpreter's own."""

    rows: int
    width: int
    words: int
    dtype: torch.dtype
    softcap: float | None = None
    temperature: float = 1.0
    bias: bool = False
    capability: tuple[int, int] | None = None
    ignored: int = 4  # each fourth row; each for 1

    def __str__(self):
        head = f"cap{self.softcap}-T{self.temperature}" + "-bias" * self.bias
        tiles = f"-sm{self.capability[0]}{self.capability[1]}" if self.capability else ""
        return f"N{self.rows}-D{self.width}-V{self.words}-{NAMES[self.dtype]}-{head}{tiles}"

    @property
    def counted(self) -> int:
        return self.rows - -(-self.rows // self.ignored)


def token_logps_cases(large: bool) -> Iterator[Case]:
    odd = _odd_cases(large)
    return (Case("token_logps", str(case), _token_logps_case, (case,)) for case in (*odd, *tile_cases(large)))


# No size is a multiple of a block, and with 400 rows the interpreter has more tiles than one group (16) and three steps
# of K; a vocabulary of today's size on a device. Then a cap, a bias and a temperature alone and together; and
# temperatures at which exponents are in the hundreds.
def _odd_cases(large: bool) -> Iterator[HeadCase]:
    shapes = ((1, 3, 5), (63, 40, 100), (37, 64, 130)) + (((1000, 576, 49_152), (300, 1024, 151_936)) if large else ())
    heads = ((None, 1.0, False), (5.0, 0.7, True), (30.0, 1.0, False), (None, 1.0, True))
    for shape, head, dtype in itertools.product(shapes, heads, (BF16, FP16, FP32)):
        if shape[0] < 300 or head in heads[:2]:
            yield HeadCase(*shape, dtype, *head)
    yield HeadCase(400, 40, 40, BF16)
    yield from (HeadCase(33, 40, 70, FP32, *head) for head in ((None, 0.05), (30.0, 0.02)))
    yield HeadCase(5, 8, 33, FP32, ignored=1)


def tile_cases(large: bool) -> Iterator[HeadCase]:
    """Every entry of the table of tiles: sizes that 64 and 16 divide, and not; with and without a cap and a bias.

    large: more row tiles than one group and many steps of K, with the tiles of the device and those of the smallest;
    else two row tiles, and in the interpreter the tiles of both kinds of device.
    """
    sizes = ((3000, 576, 528), (3000, 200, 530)) if large else ((200, 128, 272), (200, 136, 270))
    heads = ((None, 1.0, False), (30.0, 0.7, True))
    for shape, head, dtype in itertools.product(sizes, heads, (BF16, FP16, FP32) if large else (BF16, FP32)):
        for capability in (None, (8, 0)) if large else ((8, 0), (9, 0)):
            same = not large and (dtype == FP32 and capability == (9, 0) or head == heads[1] and shape == sizes[1])
            if not same:  # as a tile that the interpreter had already
                yield HeadCase(*shape, dtype, *head, capability)


def _token_logps_case(device: torch.device, case: HeadCase):
    from allo_kernels.launching import blocks_of_device  # imports Triton, for which the caller has set its mode

    hidden, weight, bias, targets, upstream = _inputs(device, case)
    positions = selected(device, (case.words * case.width,), "5%")
    known = {"target_rows": int((targets != -100).sum()), "gradient_rows": case.rows}  # at most: some have none
    some = slice(case.words // 3, case.words // 3 + 20)

    def outputs(impl):
        leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in (hidden, weight, bias)]
        values = weight.view(-1)[positions.unpack()].float().requires_grad_()
        shared = {"bias": leaves[2], "softcap": case.softcap, "temperature": case.temperature, "impl": impl}
        sparse = {"values": values, "positions": positions, **known}
        with blocks_of_device(case.capability):
            logps, lse = token_logps(leaves[0], leaves[1], targets, with_lse=True, **shared)
            compact = token_logps(leaves[0].detach(), leaves[1], targets, **sparse, **shared)
            found = torch.autograd.grad((logps * upstream).sum(), [leaf for leaf in leaves if leaf is not None])
            picked = torch.autograd.grad((compact * upstream).sum(), values)[0]
            given = (hidden, weight, targets, lse, upstream, some)
            rows = head_row_gradient(*given, gradient_rows=case.rows, **shared | {"bias": bias})
        names = ("d_hidden", "d_weight", "d_bias")[: len(found)]
        return {"logps": logps, **dict(zip(names, found, strict=True)), "d_values": picked, "d_rows": rows}

    leaves = [None if leaf is None else leaf.double().requires_grad_() for leaf in (hidden, weight, bias)]
    logps, exponent = full_logits(*leaves, targets, case.softcap, case.temperature)
    found = torch.autograd.grad((logps * upstream).sum(), [leaf for leaf in leaves if leaf is not None])
    truth = {name: Exact(d, exponent) for name, d in zip(("d_hidden", "d_weight", "d_bias"), found, strict=False)}
    d_values = Exact(found[1].view(-1)[positions.unpack()], exponent, factors=case.dtype)
    truth |= {"d_values": d_values, "d_rows": Exact(found[1][some], exponent, factors=case.dtype)}
    return outputs, {"logps": Exact(logps, exponent, logarithm=True), **truth}


def full_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, temperature: float
) -> tuple[Tensor, float]:
    """The textbook's log-probabilities [N], and the exponent of `Exact`: their largest magnitude and the logits'."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits if logits.dtype == torch.double else logits.float()) / temperature
    logps = logits.log_softmax(-1)
    counts = targets != -100
    with torch.no_grad():
        exponent = float(logits.abs().max()) + float(logps.abs().max()) if logits.numel() else 0.0
    return torch.where(counts, logps.gather(1, targets.clamp(min=0)[:, None]).squeeze(1), 0.0), exponent


def _inputs(device: torch.device, case: HeadCase) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """hidden, weight, bias, targets, and an upstream gradient that differs from row to row and is zero for some."""
    random, draw = drawing(device), torch.Generator().manual_seed(2)
    hidden = random(case.rows, case.width, dtype=case.dtype)
    weight = (random(case.words, case.width) / case.width**0.5).to(case.dtype)
    bias = random(case.words, dtype=case.dtype) if case.bias else None
    targets = torch.randint(0, case.words, (case.rows,), generator=draw)
    if case.rows > 1:
        targets[:: case.ignored] = -100
    upstream = random(case.rows)
    upstream[1::5] = 0.0
    return hidden, weight, bias, targets.to(device), upstream
