"""What `bench` times: every operation and its rivals, with what each of them computes and the bytes that it moves."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from allo_kernels import Positions, gather, key_token_dpo_loss, masked_adamw_, scatter_, swap_, topk_threshold
from allo_kernels.tools.bench_head import HeadShape, head_benchmarks
from allo_kernels.tools.bench_parts import RATIO, Benchmark, Contender, random_positions

_SECTOR = 32  # bytes that a GPU moves at least


@dataclass(frozen=True)
class Sizes:
    """What is measured: weights of the optimizer's tensors, heads, scores to rank, pairs; rounds at least.

    side: of the square matrices whose product is the ceiling.
    """

    tensors: int
    weights: int  # of each tensor
    heads: tuple[HeadShape, ...]
    scores: int
    pairs: int
    dtype: torch.dtype  # of weights and hidden states
    rounds: int
    side: int


_HEADS = (
    HeadShape("Llama-3-8B", 8192, 4096, 128_256),
    HeadShape("Gemma-2-2B", 8192, 2304, 256_000, softcap=30.0),
    HeadShape("an odd vocabulary", 8192, 4096, 32_001),
)
GPU = Sizes(32, 1 << 24, _HEADS, 1 << 29, 64, torch.bfloat16, 10, 8192)
CPU = Sizes(1, 100_000_000, (HeadShape("SmolLM2-135M", 512, 576, 49_152),), 10_000_000, 64, torch.float32, 11, 2048)


def benchmarks(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    yield from _adamw(device, sizes)
    yield from _compact(device, sizes)
    for shape in sizes.heads:
        yield from head_benchmarks(device, shape, sizes.dtype)
    yield from _topk(device, sizes)
    yield from _pair_loss(device, sizes)


def _adamw(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    count, each = sizes.tensors, sizes.weights
    parts = [random_positions(each, device) for _ in range(count)]
    positions, total = Positions.cat(parts), count * each
    entries = len(positions)
    state = [torch.randn(entries, device=device) for _ in range(4)]
    state[3].abs_()
    dense = torch.nn.Parameter(torch.zeros(total, device=device))
    dense.grad = torch.randn(total, device=device)
    settings = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    step = torch.tensor(3.0, device=device)

    def ours(bytes: float, impl: str = "auto", weights: list[Tensor] | None = None, **more) -> Contender:
        def update(held: list[Tensor], weights: list[Tensor] | None) -> list[Tensor]:
            where = {} if weights is None else {"weight": weights, "positions": positions}
            values, grad, exp_avg, exp_avg_sq = held
            masked_adamw_(values, grad, exp_avg, exp_avg_sq, step=step, impl=impl, **settings, **where, **more)
            return [values, exp_avg, exp_avg_sq, *(weights or ())]

        def result() -> list[Tensor]:
            return update(_clones(state), None if weights is None else _clones(weights))

        return Contender(lambda: update(state, weights), bytes, result)

    optimizer = torch.optim.AdamW([dense], lr=1e-5, fused=True)
    rivals = {"torch fused AdamW, dense fp32": Contender(optimizer.step, bytes=28 * total)}
    shape = f"{total / 1e6:.0f}M weights, {RATIO:.0%}"
    definition = {"PyTorch definition": ours(28 * entries, "torch")}
    yield Benchmark(
        "AdamW, compact state", shape, {"allo-fast": ours(28 * entries), **rivals, **definition}, tolerance=1e-5
    )
    for dtype in {sizes.dtype: None, torch.bfloat16: None}:
        weights = [torch.zeros(each, dtype=dtype, device=device) for _ in range(count)]
        moved = 30 * entries + 2 * _sector_bytes(total, dtype)
        contenders = {"allo-fast": ours(moved, weights=weights)}
        if dtype == torch.bfloat16:
            by_chance = ours(moved, weights=weights, rounding_seed=0)
            contenders |= {"allo-fast, rounded by chance": Contender(by_chance.run, moved)}
        contenders |= rivals
        if device.type == "cuda":
            compiled = _compiled(_eager_adamw, state, weights, parts)
            contenders |= {"torch.compile": Contender(compiled, moved + 6 * entries)}
        contenders |= {"PyTorch definition": ours(moved + 14 * entries, "torch", weights)}
        op = f"AdamW, written through to {str(dtype).removeprefix('torch.')}"
        yield Benchmark(op, shape, contenders, tolerance=0.01 if dtype == torch.bfloat16 else 1e-5)


def _clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


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
    dense, positions = torch.randn(size, device=device).to(sizes.dtype), random_positions(size, device)
    index, entries = positions.unpack(), len(positions)
    values, held, itemsize = torch.randn(entries, device=device), dense[index], dense.element_size()
    sectors, shape = _sector_bytes(size, sizes.dtype), f"{size / 1e6:.0f}M weights, {RATIO:.0%}"

    def pure(run: Callable[[], Tensor], moved: float) -> Contender:
        return Contender(run, moved, lambda: (run(),))

    gathers = {
        "allo-fast": pure(lambda: gather(dense, positions, out=torch.empty_like(values)), 6 * entries + sectors),
        "torch index_select, int64": pure(lambda: dense.index_select(0, index).float(), 12 * entries + sectors),
    }
    yield Benchmark("gather", shape, gathers)
    total, start = values.clone(), values.clone()
    gathers = {
        "allo-fast": Contender(
            lambda: gather(dense, positions, out=total, accumulate=True),
            10 * entries + sectors,
            lambda: (gather(dense, positions, out=start.clone(), accumulate=True),),
        ),
        "torch index_select, add": Contender(
            lambda: total.add_(dense.index_select(0, index)),
            16 * entries + sectors,
            lambda: (start + dense.index_select(0, index),),
        ),
    }
    yield Benchmark("gather, accumulated", shape, gathers)

    def written(write: Callable[[Tensor, Tensor], object], values: Tensor, moved: float) -> Contender:
        def result() -> tuple[Tensor, Tensor]:
            target, entries = dense.clone(), values.clone()
            write(target, entries)
            return target, entries

        return Contender(lambda: write(dense, values), moved, result)

    moved = 6 * entries + 2 * sectors
    scatters = {"allo-fast": written(lambda target, given: scatter_(target, positions, given), values, moved)}
    if sizes.dtype == torch.bfloat16:
        by_chance = Contender(lambda: scatter_(dense, positions, values, rounding_seed=0), moved)
        scatters |= {"allo-fast, rounded by chance": by_chance}
    scatters |= {
        "torch index_copy_, int64": written(
            lambda target, given: target.index_copy_(0, index, given.to(target.dtype)), values, moved + 6 * entries
        )
    }
    yield Benchmark("scatter_", shape, scatters)

    def swap_eagerly(target: Tensor, given: Tensor) -> None:
        before = target.index_select(0, index)
        target.index_copy_(0, index, given)
        given.copy_(before)

    moved = (2 + 2 * itemsize) * entries + 2 * sectors
    swaps = {
        "allo-fast": written(lambda target, given: swap_(target, positions, given), held, moved),
        "torch index ops, int64": written(swap_eagerly, held, moved + (14 + 2 * itemsize) * entries + sectors),
    }
    yield Benchmark("swap_", shape, swaps)


def _topk(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    for dtype, passes in ((torch.float32, 4), (torch.bfloat16, 2)):
        scores = torch.randn(sizes.scores, device=device).abs_().to(dtype)
        k, chunks = int(RATIO * sizes.scores), scores.split(max(1, sizes.scores // 8))
        runs = {  # and how often each reads the scores at least
            "allo-fast": (lambda chunks=chunks, k=k: topk_threshold(chunks, k).value, passes),
            "torch topk": (lambda scores=scores, k=k: scores.topk(k, sorted=False).values.amin(), 1),
            "torch sort": (lambda scores=scores, k=k: scores.sort(descending=True).values[k - 1], 1),
        }
        contenders = {
            name: Contender(run, reads * scores.nbytes, lambda run=run: (run().float().cpu(),))
            for name, (run, reads) in runs.items()
        }
        shape = f"{sizes.scores / 1e6:.0f}M scores, {str(dtype).removeprefix('torch.')}"
        yield Benchmark("topk_threshold", shape, contenders)


def _pair_loss(device: torch.device, sizes: Sizes) -> Iterator[Benchmark]:
    rows, length = sizes.pairs, 512
    policy = [-torch.rand(rows, length, device=device) for _ in range(2)]
    ref = [-torch.rand(rows, length, device=device) for _ in range(2)]
    valid = [torch.rand(rows, length, device=device) < 0.8 for _ in range(2)]

    def step(impl: str, bytes: float = 0.0) -> Contender:
        def run() -> tuple[Tensor, ...]:
            leaves = [logps.requires_grad_() for logps in policy]
            losses = key_token_dpo_loss(*leaves, *ref, *valid, fraction=0.1, beta=0.1, impl=impl)[0]
            return losses, *torch.autograd.grad(losses.sum(), leaves)

        return Contender(run, bytes, run)

    # Log-probabilities and masks read, weights and gradients written, gradients read and written by backward.
    contenders = {"allo-fast": step("auto", (4 * (4 + 3 + 2 + 2) + 2) * rows * length)}
    contenders |= {"PyTorch definition": step("torch")}
    text = f"{rows} pairs of {length} tokens"
    yield Benchmark("key_token_dpo_loss, forward + backward", text, contenders, tolerance=1e-4)


def _sector_bytes(size: int, dtype: torch.dtype) -> float:
    """Bytes of the 32-byte sectors in which at least one of `size` weights is selected, on average."""
    per_sector = _SECTOR // dtype.itemsize
    return size * dtype.itemsize * (1 - (1 - RATIO) ** per_sector)
