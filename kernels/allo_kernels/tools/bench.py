"""Every kernel timed beside its rivals in the same run, all in turn, after their results were compared.

A rival that cannot run here is a row that says why. A wrong result ends the run: nobody needs to know how fast it was.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allo_kernels import memory
from allo_kernels.tools.bench_cases import Sizes, benchmarks
from allo_kernels.tools.bench_parts import Benchmark

_ROUNDS, _BUSY_MS = 100, 1000  # of a benchmark on a GPU at most: rounds, and for how long a contender runs in all
_CACHE_BYTES = 256 << 20  # more than any GPU's cache
_AHEAD = 8  # times that it is cleared first: half a millisecond in which the host issues what comes


class WrongResult(RuntimeError):
    """A contender computed something else than the reference, at the benchmarked size."""


@dataclass(frozen=True)
class Row:
    """One contender. spread_ms: 80th minus 20th percentile; peak_mib: above what its inputs take.

    gbytes_per_s is of the bytes that this contender moves at least. tflops is of what the operation needs at least,
    whoever runs it: a head that recomputes its logits is charged for the time and not paid for the FLOPs.
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
    difference: float | None = None  # from the reference's result, of its largest number; None: nothing to compare
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
    """Yields after each benchmark. Raises WrongResult."""
    ceilings = measure_ceilings(device, sizes)
    for benchmark in benchmarks(device, sizes):
        yield from ((ceilings, row) for row in _rows(benchmark, device, sizes, ceilings))


def measure_ceilings(device: torch.device, sizes: Sizes) -> Ceilings:
    source = torch.empty(sizes.tensors * sizes.weights, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(sizes.side, sizes.side, device=device).to(sizes.dtype) for _ in range(2))
    copied = _time({"copy": lambda: target.copy_(source)}, device, sizes.rounds)["copy"][0]
    multiplied = _time({"product": lambda: left @ right}, device, sizes.rounds)["product"][0]
    return Ceilings(2 * source.nbytes / copied / 1e6, 2 * sizes.side**3 / multiplied / 1e9)


def _rows(benchmark: Benchmark, device: torch.device, sizes: Sizes, ceilings: Ceilings) -> Iterator[Row]:
    absent = {name: contender.run for name, contender in benchmark.contenders.items() if isinstance(contender.run, str)}
    runs = {name: contender.run for name, contender in benchmark.contenders.items() if name not in absent}
    absent |= {name: said for name, run in runs.items() if (said := _why_it_fails(run))}
    differences = _compared(benchmark, absent)
    times = _time({name: run for name, run in runs.items() if name not in absent}, device, sizes.rounds)
    ours = times.get(next(iter(benchmark.contenders)), (None,))[0]
    for name, contender in benchmark.contenders.items():
        if name in absent:
            yield Row(benchmark.op, benchmark.shape, name, absent=absent[name])
            continue
        median, spread = times[name]
        bandwidth, rate = contender.bytes / median / 1e6, benchmark.flops / median / 1e9
        yield Row(
            op=benchmark.op,
            shape=benchmark.shape,
            contender=name,
            median_ms=median,
            spread_ms=spread,
            peak_mib=_peak(contender.run, device),
            gbytes_per_s=bandwidth or None,
            tflops=rate or None,
            of_ceiling=max(bandwidth / ceilings.gbytes_per_s, rate / ceilings.tflops),
            speedup=ours and median / ours,
            difference=differences.get(name),
        )


def _why_it_fails(run: Callable[[], object]) -> str:
    """For a contender that fails here (a missing compiler, too little memory) what it said."""
    try:
        run()
    except Exception as error:
        return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def _compared(benchmark: Benchmark, absent: dict[str, str]) -> dict[str, float]:
    """How far each contender's result is from the last one's that has one, which is the reference."""
    results = {
        name: contender.result
        for name, contender in benchmark.contenders.items()
        if contender.result is not None and name not in absent
    }
    if len(results) < 2:
        return {}
    *compared, reference = results
    truth, found = results[reference](), {}
    for name in compared:
        found[name] = max(_difference(*both) for both in zip(results[name](), truth, strict=True))
        if not found[name] <= benchmark.tolerance:
            said = f"{found[name]:.3g} of its largest number away from {reference}, allowed {benchmark.tolerance:.3g}"
            raise WrongResult(f"{benchmark.op}, {benchmark.shape}, {name}: {said}")
    return found


def _difference(ours: Tensor, reference: Tensor) -> float:
    """Largest, over the largest number of the reference; in parts, because copies in fp32 may not fit."""
    if ours.shape != reference.shape:
        return math.inf
    largest = distance = 0.0
    parts = (tensor.detach().reshape(-1).split(1 << 26) for tensor in (ours, reference))
    for mine, theirs in zip(*parts, strict=True):
        largest = max(largest, float(theirs.float().abs().max()))
        distance = max(distance, float((mine.float() - theirs.float()).abs().nan_to_num(math.inf, math.inf).max()))
    return distance / largest if largest else distance


def _time(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, tuple[float, float]]:
    """Median and spread in ms; contenders take turns, so that a busy moment or a hot device hits all of them."""
    times = (_turns_on_gpu if device.type == "cuda" else _turns_on_cpu)(runs, rounds)
    return {name: (statistics.median(taken), _spread(taken)) for name, taken in times.items()}


def _turns_on_cpu(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: taken[1:] for name, taken in times.items()}


def _turns_on_gpu(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """By events of the device, each turn with a cold cache, and every second round the other way round; clearing it,
    some times before the first, also lets the host get ahead."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")
    for number in range(_ROUNDS + 3):
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in runs}
        for _ in range(_AHEAD):
            cache.zero_()
        for name, run in list(runs.items())[:: -1 if number % 2 else 1]:
            cache.zero_()
            events[name][0].record()
            run()
            events[name][1].record()
        torch.cuda.synchronize()
        if number >= 3:  # the first warm up
            for name, (began, ended) in events.items():
                times[name].append(began.elapsed_time(ended))
        longest = max((sum(taken) for taken in times.values()), default=0.0)
        if number >= 3 + max(rounds, 10) and longest > _BUSY_MS:
            break
    return times


def _spread(times: Sequence[float]) -> float:
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
        "difference": lambda row: _number(row.difference, 2),
    }
    lines = [list(columns), ["---"] * len(columns), *([show(row) for show in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}" if value < 10**digits else f"{value:.0f}"
