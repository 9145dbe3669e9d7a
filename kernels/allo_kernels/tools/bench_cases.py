"""What `bench` times: every operation, its rivals, and the bytes or FLOPs that it needs at least."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from allo_kernels import (
    Positions,
    gather,
    key_token_dpo_loss,
    masked_adamw_,
    scatter_,
    swap_,
    token_logps,
    topk_threshold,
)

_SECTOR = 32  # bytes that a GPU moves at least


@dataclass(frozen=True)
class Sizes:
    """What is measured: weights of the optimizer's tensors, tokens x width x words of the head, scores to rank."""

    tensors: int
    weights: int  # of each tensor
    head: tuple[int, int, int]
    scores: int
    pairs: int
    dtype: torch.dtype  # of weights and hidden states
    rounds: int


GPU = Sizes(32, 1 << 24, (8192, 4096, 128_256), 1 << 29, 64, torch.bfloat16, 0)
CPU = Sizes(1, 100_000_000, (512, 576, 49_152), 10_000_000, 64, torch.float32, 11)
RATIO = 0.05


@dataclass(frozen=True)
class Benchmark:
    """contenders: by name, what to run, or why it cannot; bytes and flops: what the operation needs at least."""

    op: str
    shape: str
    contenders: dict[str, Callable[[], object] | str]
    bytes: float = 0.0
    flops: float = 0.0


def benchmarks(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    for make in (_adamw, _compact, _token_logps, _topk, _pair_loss):
        yield from make(device, sizes)


def _adamw(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    count, each = sizes.tensors, sizes.weights
    parts = [_random_positions(each, device) for _ in range(count)]
    positions, total = Positions.cat(parts), count * each
    state = [torch.randn(len(positions), device=device) for _ in range(4)]
    state[3].abs_()
    dense = torch.nn.Parameter(torch.zeros(total, device=device))
    dense.grad = torch.randn(total, device=device)
    settings = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    step = torch.tensor(3.0, device=device)

    def ours(impl="auto", **where):
        return lambda: masked_adamw_(*state, step=step, impl=impl, **settings, **where)

    optimizer = torch.optim.AdamW([dense], lr=1e-5, fused=True)
    rivals = {"torch fused AdamW, dense fp32": optimizer.step}
    shape, entries = f"{total / 1e6:.0f}M weights, {RATIO:.0%}", len(positions)
    yield Benchmark("AdamW, compact state", shape, {"allo-fast": ours(), **rivals}, bytes=28 * entries)
    for dtype in {sizes.dtype: None, torch.bfloat16: None}:
        weights = [torch.zeros(each, dtype=dtype, device=device) for _ in range(count)]
        where = {"weight": weights, "positions": positions}
        contenders = {"allo-fast": ours(**where)}
        if dtype == torch.bfloat16:
            contenders |= {"allo-fast, rounded by chance": ours(**where, rounding_seed=0)}
        contenders |= rivals
        if device.type == "cuda":
            contenders |= {"PyTorch definition": ours("torch", **where)}
            contenders |= {"torch.compile": _compiled(_eager_adamw, state, weights, parts)}
        yield Benchmark(
            f"AdamW, written through to {str(dtype).removeprefix('torch.')}",
            shape,
            contenders,
            bytes=30 * entries + 2 * _sector_bytes(total, dtype),
        )


def _eager_adamw(state: list[Tensor], weights: list[Tensor], indices: list[Tensor]) -> None:
    values, grad, exp_avg, exp_avg_sq = state
    exp_avg.lerp_(grad, 0.1)
    exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
    values.sub_(1e-5 * exp_avg / (exp_avg_sq.sqrt() + 1e-8))
    for weight, index, part in zip(weights, indices, values.split([len(i) for i in indices]), strict=True):
        weight.index_copy_(0, index, part.to(weight.dtype))


def _compiled(function: Callable, state: list[Tensor], weights: list[Tensor], parts: list[Positions]) -> Callable:
    indices, compiled = [part.unpack() for part in parts], torch.compile(function)
    return lambda: compiled(state, weights, indices)


def _compact(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    size = sizes.tensors * sizes.weights // 2
    dense, positions = torch.randn(size, device=device).to(sizes.dtype), _random_positions(size, device)
    index, entries = positions.unpack(), len(positions)
    values, held, itemsize = torch.randn(entries, device=device), dense[index], dense.element_size()
    sectors, shape = _sector_bytes(size, sizes.dtype), f"{size / 1e6:.0f}M weights, {RATIO:.0%}"
    gathers = {
        "allo-fast": lambda: gather(dense, positions, out=values),
        "torch index_select, int64": lambda: dense.index_select(0, index).float(),
    }
    yield Benchmark("gather", shape, gathers, bytes=6 * entries + sectors)
    gathers = {
        "allo-fast": lambda: gather(dense, positions, out=values, accumulate=True),
        "torch index_select, add": lambda: values.add_(dense.index_select(0, index)),
    }
    yield Benchmark("gather, accumulated", shape, gathers, bytes=10 * entries + sectors)
    scatters = {"allo-fast": lambda: scatter_(dense, positions, values)}
    if sizes.dtype == torch.bfloat16:
        scatters |= {"allo-fast, rounded by chance": lambda: scatter_(dense, positions, values, rounding_seed=0)}
    scatters |= {"torch index_copy_, int64": lambda: dense.index_copy_(0, index, values.to(dense.dtype))}
    yield Benchmark("scatter_", shape, scatters, bytes=6 * entries + 2 * sectors)

    def swap_eagerly():
        before = dense.index_select(0, index)
        dense.index_copy_(0, index, held)
        held.copy_(before)

    swaps = {"allo-fast": lambda: swap_(dense, positions, held), "torch index ops, int64": swap_eagerly}
    yield Benchmark("swap_", shape, swaps, bytes=(2 + 2 * itemsize) * entries + 2 * sectors)


def _token_logps(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    tokens, width, words = sizes.head
    hidden = torch.randn(tokens, width, device=device).to(sizes.dtype).requires_grad_()
    weight = (torch.randn(words, width, device=device) / width**0.5).to(sizes.dtype)
    targets, upstream = torch.randint(0, words, (tokens,), device=device), torch.randn(tokens, device=device)
    positions = _random_positions(words * width, device)
    values = gather(weight, positions).float().requires_grad_()
    trained = weight.detach().clone().requires_grad_()

    def full(head):
        return F.linear(hidden, head).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    def step(logps, *leaves):
        return lambda: torch.autograd.grad((logps() * upstream).sum(), [hidden, *leaves])

    shape = f"N={tokens} D={width} V={words} {str(sizes.dtype).removeprefix('torch.')}"
    product, name = 2 * tokens * width * words, "token_logps, forward + backward, "
    frozen = {"allo-fast": step(lambda: token_logps(hidden, weight, targets))}
    frozen |= {"full logits": step(lambda: full(weight))}
    yield Benchmark(name + "frozen head", shape, frozen, flops=2 * product)
    compact = {
        "allo-fast, 5 % selected": step(
            lambda: token_logps(hidden, weight, targets, values=values, positions=positions), values
        ),
        "allo-fast, dense gradient": step(lambda: token_logps(hidden, trained, targets), trained),
        "full logits": step(lambda: full(trained), trained),
        "torch linear_cross_entropy, chunked, sum": _linear_cross_entropy(hidden, trained, targets),
        "Liger-Kernel, sum": _liger(hidden, trained, targets),
    }
    if device.type == "cuda":
        definition = step(lambda: token_logps(hidden, trained, targets, impl="torch"), trained)
        compact |= {"PyTorch definition": definition}
        compact |= {"torch.compile, full logits": step(torch.compile(lambda: full(trained)), trained)}
    yield Benchmark(name + "trained head", shape, compact, flops=3 * product)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], object] | str:
    if not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: torch.autograd.grad(
        F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options), [hidden, weight]
    )


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], object] | str:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if hidden.device.type != "cuda":
        return "it needs a GPU"
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda: torch.autograd.grad(loss(weight, hidden, targets), [hidden, weight])


def _topk(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.randn(sizes.scores, device=device).abs_().to(dtype)
        k, chunks = int(RATIO * sizes.scores), scores.split(max(1, sizes.scores // 8))
        contenders = {
            "allo-fast": lambda chunks=chunks, k=k: topk_threshold(chunks, k),
            "torch topk": lambda scores=scores, k=k: scores.topk(k, sorted=False).values.amin(),
            "torch sort": lambda scores=scores, k=k: scores.sort(descending=True).values[k - 1],
        }
        shape = f"{sizes.scores / 1e6:.0f}M scores, {str(dtype).removeprefix('torch.')}"
        yield Benchmark("topk_threshold", shape, contenders, bytes=scores.nbytes)


def _pair_loss(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    rows, length = sizes.pairs, 512
    policy = [-torch.rand(rows, length, device=device) for _ in range(2)]
    ref = [-torch.rand(rows, length, device=device) for _ in range(2)]
    valid = [torch.rand(rows, length, device=device) < 0.8 for _ in range(2)]

    def step(impl):
        leaves = [logps.requires_grad_() for logps in policy]
        losses = key_token_dpo_loss(*leaves, *ref, *valid, fraction=0.1, beta=0.1, impl=impl)[0]
        return torch.autograd.grad(losses.sum(), leaves)

    contenders = {"allo-fast": lambda: step("auto")}
    if device.type == "cuda":
        contenders |= {"PyTorch definition": lambda: step("torch")}
    yield Benchmark("key_token_dpo_loss, forward + backward", f"{rows} pairs of {length} tokens", contenders)


def _random_positions(size: int, device: torch.device) -> Positions:
    draw = torch.Generator(device).manual_seed(0)
    mask = torch.rand(size, generator=draw, device=device) < RATIO
    return Positions.pack(mask.nonzero().squeeze(1), size)


def _sector_bytes(size: int, dtype: torch.dtype) -> float:
    """Bytes of the 32-byte sectors in which at least one of `size` weights is selected, on average."""
    per_sector = _SECTOR // dtype.itemsize
    return size * dtype.itemsize * (1 - (1 - RATIO) ** per_sector)
