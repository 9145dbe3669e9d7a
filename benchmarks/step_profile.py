"""Where the time of our step goes: the model's arithmetic, and what the engine adds to it.

Ranges are laid around a few functions while the work runs under torch's profiler. An operator belongs to the innermost
range that it runs in, by its own time (without what it calls), so that the shares add up to the whole epoch, reference
pass and all. Of the engine are: making batches (here before the step, not beside it) and how they are packed, the loss,
gathering compact gradients, clipping and the optimizer, the reference's kept log-probabilities, the log, and everything
that runs in no range. Of the model are the decoder and the head, forward (the reference's apart) and backward, by kinds
of operators; `between operators` is Python and autograd there. The head's chunks and their sums count as the model's,
gathering its selected entries from them as the engine's. Times are of the host: on a GPU the trace has the device's.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MODEL, ENGINE = "model", "engine"
RANGES = {  # what runs in a function, and that is not in a range within it; "module:name" or "module:class.name"
    "make batches": (ENGINE, "allo_fast.training.examples:Examples.collate", "allo_fast.data.batch:Batch.to"),
    "packing": (ENGINE, "allo_fast.model.attention:inputs", "allo_fast.model.attention:Packing.pieces"),
    "loss": (ENGINE, "allo_fast.method.objectives:Dpo.__call__"),
    "gather gradients": (
        ENGINE,
        "allo_fast.method.policy:SparsePolicy._take",
        "allo_fast.method.sampled:Pattern.matrix",
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
    "head": (MODEL, "allo_fast.model.logps:_Head.forward"),
    "backward": (MODEL, "allo_fast.training.backend:LocalBackend.backward"),
}
DECODER, REST, REFERENCE = "decoder", "rest of the loop", "reference's "
KINDS = {  # of operators, by what their names contain
    "matrix products": ("mm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "copies": ("copy", "clone", "contiguous", "cat", "_to_", "fill", "zero"),
}


@dataclass(frozen=True)
class Part:
    side: str
    range: str
    kind: str  # of the model's: of operators
    milliseconds: float


@contextmanager
def profiled(trace: Path) -> Iterator[None]:
    """Of what runs inside, writes a trace for chrome://tracing or Perfetto to `trace`, and prints the table."""
    with ExitStack() as ranges:
        for name, (_, *functions) in RANGES.items():
            for function in functions:
                ranges.enter_context(_range(name, function))
        ranges.enter_context(_decoder_range())
        ranges.enter_context(patch("allo_fast.training.examples.ThreadPoolExecutor", _AtOnce))
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(_label(REST)):
            yield
    profiler.export_chrome_trace(str(trace))
    print(table(parts(profiler.events())), flush=True)


def table(found: list[Part]) -> str:
    """Of all parts, the largest first, each side's sum, and the engine's share."""
    whole = sum(part.milliseconds for part in found)
    lines = [f"{'side':<8}{'range':<22}{'operators':<22}{'ms':>10}{'share':>8}"]
    for part in sorted(found, key=lambda part: -part.milliseconds):
        share = part.milliseconds / whole
        lines.append(f"{part.side:<8}{part.range:<22}{part.kind:<22}{part.milliseconds:>10.1f}{share:>8.2%}")
    engine = sum(part.milliseconds for part in found if part.side == ENGINE)
    return "\n".join([*lines, f"the engine's share: {engine / whole:.2%} of {whole / 1e3:.2f} s"])


def parts(events) -> list[Part]:
    """events: a profiler's, of which every one is the child of what called it."""
    sums: Counter[tuple[str, str, str]] = Counter()
    waiting = [(event, REST) for event in events if event.cpu_parent is None]
    while waiting:
        event, name = waiting.pop()
        name = event.name.removeprefix(_label("")) if event.name.startswith(_label("")) else name
        plain = name.removeprefix(REFERENCE)
        side = MODEL if plain == DECODER else RANGES.get(plain, (ENGINE,))[0]
        sums[side, name, _kind(event.name) if side == MODEL else ""] += event.self_cpu_time_total
        waiting += [(child, name) for child in event.cpu_children]
    return [Part(*key, microseconds / 1e3) for key, microseconds in sums.items()]


def _kind(operator: str) -> str:
    if not operator.startswith("aten::"):
        return "between operators"
    kinds = (kind for kind, names in KINDS.items() if any(name in operator for name in names))
    return next(kinds, "other operators")


def _label(name: str) -> str:
    return f"allo: {name}"


class _AtOnce:
    """Instead of a thread, whose work a profile of this one does not show."""

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
def _range(name: str, function: str) -> Iterator[None]:
    module, _, path = function.partition(":")
    owner = import_module(module)
    *classes, attribute = path.split(".")
    for step in classes:
        owner = getattr(owner, step)
    with patch.object(owner, attribute, _within(name, getattr(owner, attribute))):
        yield


def _within(name: str, function: Callable) -> Callable:
    forward = name in (DECODER, "head")

    @wraps(function)
    def ranged(*arguments, **options):
        reference = REFERENCE if forward and not torch.is_grad_enabled() else ""
        with record_function(_label(reference + name)):
            return function(*arguments, **options)

    return ranged


@contextmanager
def _decoder_range() -> Iterator[None]:
    """Around whatever module the log-probabilities come from."""
    from allo_fast.model.logps import ResponseLogps

    plain = ResponseLogps._in_one_pass

    def ranged(self, batch):
        (decoder,) = self._decoder
        with patch.object(decoder, "forward", _within(DECODER, decoder.forward)):
            return plain(self, batch)

    with patch.object(ResponseLogps, "_in_one_pass", ranged):
        yield
