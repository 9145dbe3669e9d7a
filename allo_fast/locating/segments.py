"""A model run in segments: from one of its layers to another, with what enters and what comes back known from before.

    embedding |cut 0| layer 0 |cut 1| layer 1 | ... |cut L| norm, head, loss
    stage 0          stage 1         stage 2                stage L + 1

At the frozen base the hidden states at a cut, and the gradient of the loss by them, are the same in every pass. So a
pass for the weights of one layer runs that layer alone, and all passes together cost little more than one over all.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from allo_fast.config import UserError
from allo_fast.data.batch import Batch
from allo_fast.locating.taps import Taps
from allo_fast.locating.windows import Piece
from allo_fast.model.logps import HeadPass, ResponseLogps
from allo_fast.model.probe import said_by
from allo_fast.model.weights import named_weights

logger = logging.getLogger(__name__)

_TOLERANCE = 2e-2  # of what a segment gives against the whole on a GPU, whose sums round as they come; on a CPU none


class _Reached(Exception):
    """Ends a forward pass at a cut."""


class Segments:
    """entrances: the modules behind the cuts, the layers in their order and what is called after them.

    stages: by the name of a weight, where it is read. in_tuples: whether a layer's hidden states come in a tuple. The
    head's weight belongs to no segment: its gradient needs only what entered the head.
    """

    def __init__(
        self,
        logps: ResponseLogps,
        entrances: Sequence[nn.Module],
        stages: Mapping[str, set[int]],
        in_tuples: Sequence[bool],
    ):
        self.logps, self.entrances, self.stages, self.in_tuples = logps, entrances, stages, in_tuples

    @property
    def last_stage(self) -> int:
        return len(self.entrances)

    def runs(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """First and last stage of each segment that reads one of these weights, stages next to each other as one."""
        runs: list[tuple[int, int]] = []
        for stage in sorted(set().union(*(self.stages.get(name, set()) for name in names))):
            if runs and runs[-1][1] == stage - 1:
                runs[-1] = runs[-1][0], stage
            else:
                runs.append((stage, stage))
        return runs

    def cuts(self, runs: Sequence[tuple[int, int]]) -> set[int]:
        """Where these segments begin and end."""
        starts = {first - 1 for first, _ in runs if first}
        return starts | {last for _, last in runs if last < self.last_stage}

    def capture(
        self, batch: Batch, loss: Callable[[Tensor], Tensor], cuts: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor], HeadPass, Tensor]:
        """At each cut the hidden states, and the gradient of loss(logps) by them; of the head what entered, and the
        gradient by its result."""
        states: dict[int, Tensor] = {}
        head: list[tuple[HeadPass, Tensor]] = []

        def keep(cut: int, hidden: Tensor) -> Tensor:
            if cut not in states:  # else activation checkpointing computes it again
                states[cut] = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            return states[cut]

        def keep_head(given: HeadPass, logps: Tensor) -> Tensor:
            head.append((given, logps))
            return logps

        with self.entered({cut: keep for cut in cuts}):
            self.logps.head.on_logps = keep_head
            try:
                value = loss(self.logps(batch))
            finally:
                self.logps.head.on_logps = None
            ((given, logps),) = head
            *gradients, upstream = torch.autograd.grad(value, [*(states[cut] for cut in cuts), logps])
        return [states[cut].detach() for cut in cuts], gradients, given, upstream

    def backward(
        self,
        batch: Batch,
        loss: Callable[[Tensor], Tensor],
        run: tuple[int, int],
        start: Tensor | None,
        gradient: Tensor | None,
    ) -> Tensor | None:
        """Runs a segment forward, from `start`, and backward, from `gradient` or from the loss; what it ends with.

        start: None where it begins with the embedding; gradient: None where it ends with the loss.
        """
        (first, last), reached = run, None

        def stop(cut: int, hidden: Tensor) -> Tensor:
            nonlocal reached
            reached = hidden
            raise _Reached

        entered = {cut: _same for cut in range(first - 1)}
        if start is not None:
            entered[first - 1] = lambda cut, hidden: start
        if last < self.last_stage:
            entered[last] = stop
        with self.entered(entered, passed=range(first - 1)):
            try:
                reached = loss(self.logps(batch))
            except _Reached:
                pass
            if reached.requires_grad:
                torch.autograd.backward(reached, gradient)
        return reached

    @contextmanager
    def entered(
        self, entered: Mapping[int, Callable[[int, Tensor], Tensor]], passed: Sequence[int] = ()
    ) -> Iterator[None]:
        """Inside, what enters at a cut is what a function makes of it; passed: layers that give back what entered."""
        modules = [self.entrances[cut] for cut in entered]
        plain = [vars(module).get("forward") for module in modules]  # of its own, as accelerate gives it
        for module, (cut, change) in zip(modules, entered.items(), strict=True):
            module.forward = self._bent(cut, change, cut in passed)
        try:
            yield
        finally:
            for module, forward in zip(modules, plain, strict=True):
                del module.forward
                if forward:
                    module.forward = forward

    def _bent(self, cut: int, change: Callable[[int, Tensor], Tensor], passed: bool) -> Callable:
        plain = self.entrances[cut].forward

        def forward(*args, **kwargs):
            hidden = change(cut, args[0] if args else kwargs["hidden_states"])
            if passed:
                return (hidden, None) if self.in_tuples[cut] else hidden
            return plain(hidden, *args[1:], **kwargs) if args else plain(**kwargs | {"hidden_states": hidden})

        return forward


def _same(cut: int, hidden: Tensor) -> Tensor:
    return hidden


class _Trace:
    """What one forward pass does, in order: modules entered and left, weights read."""

    def __init__(self):
        self.events: list[tuple[str, object]] = []
        self.in_tuples: dict[nn.Module, bool] = {}

    @contextmanager
    def watch(self, root: nn.Module) -> Iterator[None]:
        handles = []
        for module in root.modules():
            handles.append(module.register_forward_pre_hook(lambda m, inputs: self.events.append(("enter", m))))
            handles.append(module.register_forward_hook(self._left))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self, module: nn.Module, inputs: tuple, output: object) -> None:
        self.events.append(("leave", module))
        self.in_tuples[module] = isinstance(output, tuple)

    def entrances(self) -> list[nn.Module]:
        """The decoder's layers and the module that is entered after them; none where a layer is entered twice."""
        layers, inside, after = [], None, None
        for kind, what in self.events:
            if kind == "enter" and inside is None:
                if isinstance(what, GradientCheckpointingLayer):
                    layers.append(what)
                    inside, after = what, None
                elif layers:
                    after = after or what
            elif kind == "leave" and what is inside:
                inside = None
        return [*layers, after] if layers and after is not None and len(set(layers)) == len(layers) else []

    def stages(self, model: nn.Module, entrances: Sequence[nn.Module]) -> dict[str, set[int]]:
        """How many entrances lie before each read of a weight; one that was not read, as an expert that no token went
        to, is read where its layer is, or may be anywhere."""
        stages: dict[str, set[int]] = {}
        stage, left = 0, list(entrances)
        for kind, what in self.events:
            if kind == "enter" and left and what is left[0]:
                stage += 1
                left.pop(0)
            elif kind == "read":
                stages.setdefault(what, set()).add(stage)
        layers = {id(w): {number} for number, layer in enumerate(entrances, start=1) for w in layer.parameters()}
        anywhere = set(range(len(entrances) + 1))
        return {name: layers.get(id(w), anywhere) for name, w in named_weights(model).items()} | stages


def find_segments(taps: Taps, logps: ResponseLogps, batch: Batch, loss: Callable[[Tensor], Tensor]) -> Segments | None:
    """The segments of a model, tried on one batch; None, which is said, where its layers are not that simple."""
    trace = _Trace()
    with trace.watch(logps), taps.watch(lambda name: trace.events.append(("read", name))), torch.no_grad():
        logps(batch)
    if entrances := trace.entrances():
        in_tuples = [trace.in_tuples[module] for module in entrances]
        stages = trace.stages(logps.model, entrances)
        stages[taps.head] = stages[taps.head] - {len(entrances)}
        segments = Segments(logps, entrances, stages, in_tuples)
        try:
            fault = _fault(segments, taps, batch, loss)
        except UserError:
            raise
        except Exception as error:  # a model's own code may raise anything where it is bent like this
            fault = said_by(error)
        if fault is None:
            return segments
    else:
        fault = "it has none that are called once each"
    name = type(logps.model).__name__
    logger.warning("locating: every pass runs the whole model, which takes longer: layers of %s: %s", name, fault)
    return None


def _fault(segments: Segments, taps: Taps, batch: Batch, loss: Callable[[Tensor], Tensor]) -> str | None:
    """What a segment does not know of."""
    if segments.logps.findings.together is not None:
        return "rows run one at a time"
    if _goes_round(segments, taps, batch, loss):
        return "a weight before them reaches the loss past the first of them"
    worst, allowed = _worst_difference(segments, batch, loss), _TOLERANCE if batch.input_ids.is_cuda else 0.0
    return None if worst <= allowed else f"states or gradients differ by {worst:.1e} of their norm"


def _goes_round(segments: Segments, taps: Taps, batch: Batch, loss: Callable[[Tensor], Tensor]) -> bool:
    """Whether a weight that is read before the first layer has another way to the loss than into it."""
    before = [Piece(name, 0, 0) for name, stages in segments.stages.items() if 0 in stages]
    with ExitStack() as tapped:
        tapped.enter_context(taps.open(before, batch.input_ids.device))

        def part(cut: int, hidden: Tensor) -> Tensor:
            tapped.close()
            return hidden.detach()

        with segments.entered({0: part}):
            return loss(segments.logps(batch)).requires_grad


def _worst_difference(segments: Segments, batch: Batch, loss: Callable[[Tensor], Tensor]) -> float:
    """Of states and gradients at every cut, layer by layer and in one pass: the largest norm, relative to its own."""
    cuts = range(segments.last_stage)
    states, gradients, *_ = segments.capture(batch, loss, cuts)
    with torch.no_grad():  # what a layer leaves in the model for another is that of other tokens now
        segments.logps(replace(batch, input_ids=batch.input_ids.flip(1)))
    differences = []
    for cut in reversed(cuts):
        start = states[cut].clone().requires_grad_()
        last = cut + 1 == segments.last_stage
        end = segments.backward(batch, loss, (cut + 1, cut + 1), start, None if last else gradients[cut + 1])
        pairs = [(start.grad, gradients[cut])] if last else [(start.grad, gradients[cut]), (end, states[cut + 1])]
        differences += [float((here.detach() - there).norm() / (there.norm() + 1e-30)) for here, there in pairs]
    return float(torch.tensor(differences).max())  # which is NaN where one of them is
