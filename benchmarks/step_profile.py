"""Where the time of our step goes: the model's arithmetic, and what the engine adds to it.

Ranges are laid around a few functions. A clock that runs in the innermost one gives each its own time, so that the
shares add up to the whole epoch, reference pass and all. Of the engine are: making batches (here before the step, not
beside it) and how they are packed, the loss, gathering compact gradients, clipping and the optimizer, the reference's
kept log-probabilities, the log, and everything that runs in no range. Of the model are the decoder and the head,
forward (the reference's apart) and backward. The head's chunks and their sums count as the model's, gathering its
selected entries from them as the engine's. Whether log-probabilities that are kept are this model's is asked once a
stage, however many steps it has, and stands apart. Times are of the host. Another epoch runs under torch's profiler,
which makes every call slower: its trace has operators within the same ranges, and a GPU's kernels.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.profiler import profile, record_function

MODEL, ENGINE, ONCE = "model", "engine", "once"  # a stage, not in each of its steps
RANGES = {  # what runs in a function, and that is not in a range within it; "module:name" or "module:class.name"
    "make batches": (ENGINE, "allo_fast.training.examples:Examples.collate", "allo_fast.data.batch:Batch.to"),
    "packing": (ENGINE, "allo_fast.model.attention:inputs", "allo_fast.model.attention:Packing.pieces"),
    "loss": (ENGINE, "allo_fast.method.objectives:Preference.__call__"),
    "gather gradients": (
        ENGINE,
        "allo_fast.method.policy:SparsePolicy._take",
        "allo_fast.method.sampled:add_rows",
        "allo_kernels.head_torch:gather",
    ),
    "clip, update": (ENGINE, "allo_fast.training.backend:LocalBackend.step"),
    "read, log": (ENGINE, "allo_fast.training.engine:Trainer._read", "allo_fast.journal:Journal.append"),
    "keep the reference": (
        ENGINE,
        "allo_fast.training.reference:Reference.save",
        "allo_fast.training.reference:Reference.item",
    ),
    "mark the reference": (
        ONCE,
        "allo_fast.method.policy:SparsePolicy.fingerprint",
        "allo_fast.training.engine:described",
    ),
    "head": (MODEL, "allo_fast.model.logps:_Head.forward"),
    "backward": (MODEL, "allo_fast.training.backend:LocalBackend.backward"),
}
DECODER, REST, REFERENCE = "decoder", "rest of the loop", "reference's "

Enter = Callable[[str], AbstractContextManager]  # a range by its name


class Clock:
    """seconds: of each range, those that passed in it and in no range within it."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._inside, self._since = REST, time.perf_counter()

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        outside = self._inside
        self._pass_to(name)
        try:
            yield
        finally:
            self._pass_to(outside)

    def _pass_to(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[self._inside] += now - self._since
        self._inside, self._since = name, now


@contextmanager
def shares() -> Iterator[None]:
    """Prints the table of what runs inside."""
    clock = Clock()
    with _ranges(clock.enter), clock.enter(REST):
        yield
    print(table(clock.seconds), flush=True)


@contextmanager
def trace(path: Path) -> Iterator[None]:
    """Of what runs inside, writes one for chrome://tracing or Perfetto."""
    with _ranges(lambda name: record_function(f"allo: {name}")), profile() as profiler:
        yield
    profiler.export_chrome_trace(str(path))


def table(seconds: dict[str, float]) -> str:
    """Of all ranges, the longest first, and the engine's share."""
    whole = sum(seconds.values())
    lines = [f"{'side':<8}{'range':<22}{'ms':>10}{'share':>8}"]
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        lines.append(f"{side(name):<8}{name:<22}{1e3 * spent:>10.1f}{spent / whole:>8.2%}")
    engine, once = (sum(s for name, s in seconds.items() if side(name) == kind) / whole for kind in (ENGINE, ONCE))
    return "\n".join([*lines, f"the engine's share: {engine:.2%} of {whole:.2f} s, and {once:.2%} once a stage"])


def side(name: str) -> str:
    plain = name.removeprefix(REFERENCE)
    return MODEL if plain == DECODER else RANGES.get(plain, (ENGINE,))[0]


@contextmanager
def _ranges(enter: Enter) -> Iterator[None]:
    with ExitStack() as stack:
        for name, (_, *functions) in RANGES.items():
            for function in functions:
                stack.enter_context(_range(name, function, enter))
        if torch.cuda.is_available():  # where the head's kernels bring a gather of their own
            stack.enter_context(_range("gather gradients", "allo_kernels.head_triton:gather", enter))
        stack.enter_context(_decoder_range(enter))
        stack.enter_context(patch("allo_fast.training.examples.ThreadPoolExecutor", _AtOnce))
        yield


class _AtOnce:
    """Instead of a thread, whose work would be in no range."""

    def __init__(self, threads: int):
        pass

    def __enter__(self) -> "_AtOnce":
        return self

    def __exit__(self, *_) -> None:
        pass

    def submit(self, work: Callable, *given) -> SimpleNamespace:
        found = work(*given)
        return SimpleNamespace(result=lambda: found)


@contextmanager
def _range(name: str, function: str, enter: Enter) -> Iterator[None]:
    module, _, path = function.partition(":")
    owner = import_module(module)
    *classes, attribute = path.split(".")
    for step in classes:
        owner = getattr(owner, step)
    with patch.object(owner, attribute, _within(name, getattr(owner, attribute), enter)):
        yield


def _within(name: str, function: Callable, enter: Enter) -> Callable:
    forward = name in (DECODER, "head")

    @wraps(function)
    def ranged(*arguments, **options):
        reference = REFERENCE if forward and not torch.is_grad_enabled() else ""
        with enter(reference + name):
            return function(*arguments, **options)

    return ranged


@contextmanager
def _decoder_range(enter: Enter) -> Iterator[None]:
    """Around whatever module the log-probabilities come from."""
    from allo_fast.model.logps import ResponseLogps

    plain = ResponseLogps._in_one_pass

    def ranged(self, batch):
        (decoder,) = self._decoder
        with patch.object(decoder, "forward", _within(DECODER, decoder.forward, enter)):
            return plain(self, batch)

    with patch.object(ResponseLogps, "_in_one_pass", ranged):
        yield
