"""Every kernel timed beside its rivals in the same run, with the bytes or FLOPs that it needs counted.

The first contender of a benchmark is ours. A rival that cannot run here is a row that says why.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from allo_kernels import memory
from allo_kernels.tools.bench_cases import Benchmark, Sizes, benchmarks


@dataclass(frozen=True)
class Row:
    """One contender. spread_ms: 80th minus 20th percentile; peak_mib: above what its inputs take.

    Rates count what the operation needs at least, whoever runs it: a head that recomputes its logits is charged for
    the time and not paid for the FLOPs.
    """

    op: str
    shape: str
    contender: str
    median_ms: float | None = None
    spread_ms: float | None = None
    peak_mib: float | None = None
    gbytes_per_s: float | None = None
    tflops: float | None = None
    of_ceiling: float | None = None  # of the copy bandwidth or matrix rate measured in this run
    speedup: float | None = None  # of ours over this one
    absent: str = ""

    @property
    def failed(self) -> bool:
        """One of ours could not run; a rival that cannot is only absent."""
        return self.contender.startswith("allo-fast") and bool(self.absent)


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured: copying (bytes read and written), and a large matrix product."""

    gbytes_per_s: float
    tflops: float


def run(device: torch.device, sizes: Sizes) -> Iterator[tuple[Ceilings, Row]]:
    """Yields after each contender."""
    ceilings = measure_ceilings(device, sizes)
    for benchmark in benchmarks(device, sizes):
        yield from ((ceilings, row) for row in _rows(benchmark, device, sizes, ceilings))


def measure_ceilings(device: torch.device, sizes: Sizes) -> Ceilings:
    source = torch.empty(sizes.tensors * sizes.weights, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(sizes.dtype) for _ in range(2))
    copied = _time({"copy": lambda: target.copy_(source)}, device, sizes.rounds)["copy"][0]
    multiplied = _time({"product": lambda: left @ right}, device, sizes.rounds)["product"][0]
    return Ceilings(2 * source.nbytes / copied / 1e6, 2 * side**3 / multiplied / 1e9)


def _rows(benchmark: Benchmark, device: torch.device, sizes: Sizes, ceilings: Ceilings) -> Iterator[Row]:
    tried = {name: run if isinstance(run, str) else _try(run) for name, run in benchmark.contenders.items()}
    times = _time({name: run for name, run in tried.items() if not isinstance(run, str)}, device, sizes.rounds)
    ours = times.get(next(iter(tried)), (None,))[0]
    for name, contender in tried.items():
        if isinstance(contender, str):
            yield Row(benchmark.op, benchmark.shape, name, absent=contender)
            continue
        median, spread = times[name]
        bandwidth, rate = benchmark.bytes / median / 1e6, benchmark.flops / median / 1e9
        yield Row(
            op=benchmark.op,
            shape=benchmark.shape,
            contender=name,
            median_ms=median,
            spread_ms=spread,
            peak_mib=_peak(contender, device),
            gbytes_per_s=bandwidth or None,
            tflops=rate or None,
            of_ceiling=max(bandwidth / ceilings.gbytes_per_s, rate / ceilings.tflops),
            speedup=ours and median / ours,
        )


def _try(run: Callable[[], object]) -> Callable[[], object] | str:
    """`run`, or for one that fails here (a missing compiler, too little memory) what it said."""
    try:
        run()
    except Exception as error:
        return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return run


def _time(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, tuple[float, float]]:
    """Median and spread in ms; on a CPU contenders take turns, so that a busy moment hits all of them."""
    if device.type == "cuda":
        from triton.testing import do_bench

        found = {name: do_bench(run, warmup=50, rep=1000, quantiles=[0.5, 0.2, 0.8]) for name, run in runs.items()}
        return {name: (median, high - low) for name, (median, low, high) in found.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: (statistics.median(taken[1:]), _spread(taken[1:])) for name, taken in times.items()}


def _spread(times: list[float]) -> float:
    ranked = sorted(times)
    return ranked[math.ceil(0.8 * len(ranked)) - 1] - ranked[int(0.2 * len(ranked))]


def _peak(run: Callable[[], object], device: torch.device) -> float:
    memory.reset_peak(device)
    before = memory.peak_bytes(device)
    run()
    return (memory.peak_bytes(device) - before) / 2**20


def as_markdown(rows: list[Row]) -> str:
    """One table; numbers that were not measured are empty."""
    columns = {
        "operation": lambda row: f"{row.op}, {row.shape}",
        "contender": lambda row: row.contender,
        "median_ms": lambda row: _number(row.median_ms, 3),
        "spread_ms": lambda row: _number(row.spread_ms, 2),
        "times ours": lambda row: row.absent or _number(row.speedup, 3),
        "peak_mib": lambda row: _number(row.peak_mib, 3),
        "gbytes_per_s": lambda row: _number(row.gbytes_per_s, 3),
        "tflops": lambda row: _number(row.tflops, 3),
        "of ceiling": lambda row: "" if not row.of_ceiling else f"{row.of_ceiling:.0%}",
    }
    lines = [list(columns), ["---"] * len(columns), *([show(row) for show in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}" if value < 10**digits else f"{value:.0f}"
