"""What `bench` times of the head: token_logps, forward and backward apart and together, beside full logits and rivals.

Everybody gets the same upstream gradient, -1 for every row, which is that of a summed negative log-likelihood: some
rivals know no other, and compute their gradients in forward already.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from allo_kernels import gather, token_logps
from allo_kernels.tools.bench_parts import Benchmark, Contender, random_positions

_TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 1e-3}  # of full logits in the same dtype


@dataclass(frozen=True)
class HeadShape:
    name: str
    tokens: int
    width: int
    words: int
    softcap: float | None = None


@dataclass
class _Way:
    """`loss()` is [N] log-probabilities or, where `summed`, their negative sum; leaves get gradients."""

    loss: Callable[[], Tensor]
    leaves: list[Tensor]
    summed: bool = False
    comparable: bool = True
    held: Tensor | None = None  # a graph for backward alone

    def backward(self, loss: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        upstream = torch.ones_like(loss) if self.summed else torch.full_like(loss, -1.0)
        return torch.autograd.grad(loss, self.leaves, upstream, retain_graph=retain_graph)

    def backward_alone(self) -> tuple[Tensor, ...]:
        if self.held is None:
            self.held = self.loss()
        return self.backward(self.held, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        return self.backward(self.loss())


def head_benchmarks(device: torch.device, shape: HeadShape, dtype: torch.dtype) -> Iterator[Benchmark]:
    hidden = torch.randn(shape.tokens, shape.width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(shape.words, shape.width, device=device) / shape.width**0.5).to(dtype)
    targets = torch.randint(0, shape.words, (shape.tokens,), device=device)
    known = {"target_rows": shape.tokens, "gradient_rows": shape.tokens, "softcap": shape.softcap}
    positions = random_positions(weight.numel(), device)
    values = gather(weight, positions).float().requires_grad_()
    trained = weight.detach().clone().requires_grad_()

    def ours(head: Tensor, **more) -> Callable[[], Tensor]:
        return lambda: token_logps(hidden, head, targets, **known, **more)

    frozen = {"allo-fast": _Way(ours(weight), [hidden])}
    dense = {
        "allo-fast, 5 % selected": _Way(
            ours(weight, values=values, positions=positions), [hidden, values], comparable=False
        ),
        "allo-fast, dense gradient": _Way(ours(trained), [hidden, trained]),
    }
    for ways, head, leaves in ((frozen, weight, [hidden]), (dense, trained, [hidden, trained])):
        ways |= {name: _way(make, hidden, head, targets, shape, leaves) for name, make in _RIVALS.items()}
        if device.type == "cuda":
            torch._functorch.config.donated_buffer = False  # a backward timed alone keeps its graph
            ways["PyTorch definition"] = _Way(ours(head, impl="torch"), leaves)
            ways["torch.compile, full logits"] = _Way(torch.compile(_full(hidden, head, targets, shape)), leaves)
        ways["full logits"] = _Way(_full(hidden, head, targets, shape), leaves)
    product = 2 * shape.tokens * shape.width * shape.words
    text = f"{shape.name}: N={shape.tokens} D={shape.width} V={shape.words}" + f" cap {shape.softcap}" * bool(
        shape.softcap
    )
    for head, ways, backward in (("frozen", frozen, product), ("trained", dense, 2 * product)):
        for phase, flops in (("forward", product), ("backward", backward), ("forward + backward", product + backward)):
            contenders = {name: _contender(way, phase) for name, way in ways.items()}
            yield Benchmark(f"token_logps, {head} head, {phase}", text, contenders, flops, _TOLERANCE[dtype])
        for way in ways.values():
            if isinstance(way, _Way):
                way.held = None


def _contender(way: _Way | str, phase: str) -> Contender:
    if isinstance(way, str):
        return Contender(way)
    run = {"forward": way.loss, "backward": way.backward_alone, "forward + backward": way.both}[phase]
    if phase == "backward" and way.summed:
        return Contender("it computes its gradients in forward")
    if phase == "forward":
        return Contender(run, result=None if way.summed else lambda: (way.loss(),))
    return Contender(run, result=run if way.comparable else None)


def _way(make: Callable, hidden: Tensor, weight: Tensor, targets: Tensor, shape: HeadShape, leaves: list) -> _Way | str:
    made = make(hidden, weight, targets, shape)
    return made if isinstance(made, str) else _Way(made[0], leaves, summed=made[1])


def _full(hidden: Tensor, weight: Tensor, targets: Tensor, shape: HeadShape) -> Callable[[], Tensor]:
    def logps() -> Tensor:
        logits = F.linear(hidden, weight).float()
        if shape.softcap is not None:
            logits = shape.softcap * torch.tanh(logits / shape.softcap)
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    return logps


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor, shape: HeadShape) -> tuple[Callable, bool] | str:
    if isinstance(module := _trl_kernels(), str):
        return module
    apply, chunk = module.ChunkedLogProbFunction.apply, 32768  # as its trainers call it
    return lambda: apply(hidden, weight, None, targets, 1.0, chunk, shape.softcap, 1.0, ())[0], False


def _cce(hidden: Tensor, weight: Tensor, targets: Tensor, shape: HeadShape) -> tuple[Callable, bool] | str:
    if (reason := _missing("cut_cross_entropy", hidden)) is not None:
        return reason
    from cut_cross_entropy import linear_cross_entropy

    return lambda: -linear_cross_entropy(hidden, weight, targets, softcap=shape.softcap, reduction="none"), False


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, shape: HeadShape) -> tuple[Callable, bool] | str:
    if (reason := _missing("liger_kernel", hidden)) is not None:
        return reason
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=shape.softcap)
    return lambda: loss(weight, hidden, targets), True


def _torchs(hidden: Tensor, weight: Tensor, targets: Tensor, shape: HeadShape) -> tuple[Callable, bool] | str:
    if not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    if shape.softcap is not None:
        return "it has no cap"
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options), True


_RIVALS = {
    "TRL, chunked": _trl,
    "cut-cross-entropy, small gradients left out": _cce,
    "Liger-Kernel, sum": _liger,
    "torch linear_cross_entropy, chunked, sum": _torchs,
}


def _missing(package: str, hidden: Tensor) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None if hidden.device.type == "cuda" else "it needs a GPU"


def _trl_kernels() -> ModuleType | str:
    """TRL's kernels without the rest of it, whose imports a bare machine has not; of that they use one function, which
    gathers a sharded head: here nothing is sharded."""
    found = importlib.util.find_spec("trl")
    if found is None:
        return "trl is not installed"
    package, trainer = ModuleType("trl_alone"), ModuleType("trl_alone.trainer.utils")
    package.__path__ = list(found.submodule_search_locations)
    trainer.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
    kernels = ModuleType("trl_alone.kernels")
    kernels.__path__ = [str(Path(path) / "kernels") for path in package.__path__]
    sys.modules |= {module.__name__: module for module in (package, kernels, trainer)}
    try:
        return importlib.import_module("trl_alone.kernels.chunked_logprob")
    except ModuleNotFoundError as error:
        return f"this trl has no chunked head: {error}"
