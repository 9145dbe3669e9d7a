"""Locating as phases: what a pass holds, how many there are, what they leave on the disk, and how long they take."""

import math
from dataclasses import dataclass

from allo_fast.config import GRADIENT_SCORES, TrainConfig
from allo_fast.locating.families import FAMILIES
from allo_fast.plan.phase import Job, Phase, loading, times_of
from allo_fast.plan.rows import example_tokens, examples, micro_batch_tokens, micro_batches, sized_by
from allo_fast.plan.shapes import BYTES, Shape
from allo_fast.plan.training import reference_bytes
from allo_fast.plan.windows import Division, base_bytes, beside_sums, divide, pieces_on_paper, room_beside, windows
from allo_fast.training.zero import Zero

_LOCATING = 16  # bytes an entry of one weight's share: both models' in float32, their difference, masks, counted ties


@dataclass(frozen=True)
class _Sweep:
    """shares: ranks that share base and sums by ZeRO-3; whole: ranks that hold the base, and divide the passes."""

    job: Job
    stage: str
    section: str
    train: TrainConfig
    score: str
    zero: Zero | None
    epochs: int

    @property
    def shape(self) -> Shape:
        return self.job.shape_in(self.stage)

    @property
    def shares(self) -> int:
        return self.job.gpus if self.zero and self.zero.sharded else 1

    @property
    def whole(self) -> int:
        return self.job.gpus // self.shares

    @property
    def tokens(self) -> int:
        """Of a micro-batch, padding included."""
        return micro_batch_tokens(self.job.config, self.section, self.train)

    @property
    def examples(self) -> int:
        every, limit = examples(self.job.config, self.job.rows, self.section), self.job.config.locate.pairs
        return min(every, limit or every)


def locate_phase(job: Job, zero: Zero | None) -> Phase:
    """The stage of that name: by gradients of the warm-up's own steps, or of one or two models without any."""
    config = job.config
    if config.located_by in GRADIENT_SCORES:
        sweep = _Sweep(job, "locate", "warmup", config.warmup, config.located_by, zero, config.warmup.num_train_epochs)
        return _gradient_phase(sweep)
    shape, shares = job.shape, job.gpus if zero and zero.sharded else 1
    width = 4 if config.located_by == "after" else BYTES[config.model.dtype]
    memory = {"base": width * shape.parameters // shares}
    if config.located_by in ("delta", "after"):
        memory["after"] = 4 * shape.parameters // shares
    if config.located_by != "random":
        memory["locating"] = _LOCATING * math.ceil(max(shape.sizes) / job.gpus)
    host = loading((4 if "after" in memory else width) * shape.parameters, shares > 1)
    placement, stage = "shares" if shares > 1 else "whole", zero.stage if zero else None
    return Phase("locate", placement, stage, memory, times=times_of(config, "locate"), **host)


def located_phase(job: Job, section: str, train: TrainConfig, zero: Zero | None) -> Phase:
    """Of a section that trains what it locates for itself: by `linear`, in one epoch."""
    stage = section.partition(".")[0]
    return _gradient_phase(_Sweep(job, f"{stage}.locate", section, train, "linear", zero, 1))


def _gradient_phase(sweep: _Sweep) -> Phase:
    job, shape, shares = sweep.job, sweep.shape, sweep.shares
    config = job.config
    room = None if config.model.device == "cpu" else _room(sweep)
    count = windows(config.locate, sweep.score, pieces_on_paper(shape.sizes), room, sweep.whole, shares)
    division = divide(sweep.score, config.locate.clip, shape.sizes, count, shares)
    memory, host = _memory(sweep, division)
    flops = _flops(sweep, division)
    return Phase(
        stage=sweep.stage,
        placement="sharded" if shares > 1 else "resident",
        zero_stage=sweep.zero.stage if sweep.zero else None,
        memory=memory,
        flops=0.0,
        seconds=flops / (job.device.mfu * job.device.peak_flops) + _sent(sweep, division) / job.bandwidth,
        scratch_bytes=4 * shape.parameters + _cut_bytes(sweep, division),
        windows=division.windows,
        passes=division.passes,
        times=times_of(config, sweep.section),
        sizes=(sized_by(sweep.section, sweep.train),),
        **host,
    )


def _room(sweep: _Sweep) -> float:
    job = sweep.job
    room = room_beside(sweep.shape, job.config.model, sweep.tokens, job.gpu_bytes, sweep.shares)
    return max(1.0, room - reference_bytes(job, sweep.train, sweep.zero))


def _memory(sweep: _Sweep, division: Division) -> tuple[dict[str, int], dict]:
    """Of a device by kind, and of the host."""
    config, shape, shares = sweep.job.config, sweep.shape, sweep.shares
    sums, reduced = max(_sums(sweep, division.largest, scoring=True), _sums(sweep, division.largest_squares), key=sum)
    on_host = config.locate.accumulators == "host"
    beside = beside_sums(shape, config.model, sweep.tokens, shares > 1)
    # Cuts are made before there are sums: states and gradients of all of them at once.
    captured = (shape.layers + 1) * beside["cut states"] - (0 if on_host else sums) - beside["transient dW"]
    beside["cut states"] = max(beside["cut states"], captured) if division.windows > 1 else 0
    memory = {"base": base_bytes(shape, config.model, shares), "accumulators": 0 if on_host else sums}
    memory |= {"reference": reference_bytes(sweep.job, sweep.train, sweep.zero), "reduced gradients": reduced, **beside}
    host = loading(BYTES[config.model.dtype] * shape.parameters, shares > 1)
    scores = {"scores": 4 * math.ceil(division.largest / shares), "accumulators": sums if on_host else 0}
    return memory, {**host, "host": {**host.get("host", {}), **scores}}


def _sums(sweep: _Sweep, window: int, scoring: bool = False) -> tuple[int, int]:
    """Of a pass, bytes that last, and of what ZeRO-3 reduces of a step's gradient; that is whole on every rank."""
    part = 4 * math.ceil(window / sweep.shares)
    return 4 * window + FAMILIES[sweep.score].states * part * scoring, part if sweep.shares > 1 else 0


def _flops(sweep: _Sweep, division: Division) -> float:
    """Of the busiest device: forward, the gradient of hidden states and that of weights take as much each."""
    shape, again = sweep.shape, int(sweep.job.config.model.gradient_checkpointing)
    forward = (
        2.0 * shape.parameters * sweep.examples * sweep.epochs * sum(example_tokens(sweep.job.config, sweep.section))
    )
    if division.passes == 1:
        return (3 + again) * forward / sweep.shares
    if sweep.shares > 1 or not any(shape.recomputed):  # every pass runs the whole model, backward half of it
        return forward * (division.passes * (1 + (1 + again) / 2) + 1 + bool(division.squares)) / sweep.shares
    # Layers run by themselves; the one that two windows share runs for both.
    capture = (2 + again) * forward / sweep.whole
    counts = [count for count in (division.squares, division.windows) if count]
    every = [(3 + again) * forward * (1 + (count - 1) / (shape.layers + 1)) for count in counts]
    busiest = [math.ceil(count / sweep.whole) / count for count in counts]
    return capture + sum(flops * part for flops, part in zip(every, busiest, strict=True))


def _sent(sweep: _Sweep, division: Division) -> float:
    """Bytes that a device gathers and reduces under ZeRO-3: the base in every pass, gradients once a step."""
    if sweep.shares == 1:
        return 0.0
    config, count = sweep.job.config, sweep.examples * sweep.epochs
    steps = math.ceil(count / sweep.train.examples_per_step)
    micros = math.ceil(steps * micro_batches(config, sweep.section, sweep.train) / sweep.shares)
    gathers = 3 if config.model.gradient_checkpointing else 2
    kinds = 1 + bool(division.squares)
    gathered = BYTES[config.model.dtype] * gathers * micros * division.passes
    return float(sweep.shape.parameters * (gathered + 4 * steps * kinds))


def _cut_bytes(sweep: _Sweep, division: Division) -> int:
    """Of disk, at most: hidden states and their gradients on both sides of the layers in which windows meet."""
    if sweep.shares > 1 or division.windows == 1 or not any(sweep.shape.recomputed):
        return 0
    shape = sweep.shape
    meetings = division.windows - 1 + max(0, division.squares - 1)
    cuts = min(shape.layers + 1, 2 * meetings + 1)  # one more where the head is the embedding
    # A micro-batch of a shorter step has another part in its loss, and files of its own: at most every epoch's.
    tokens = sweep.examples * sweep.epochs * sum(example_tokens(sweep.job.config, sweep.section))
    # And what the head reads, of tokens of responses.
    return (2 * cuts + 1) * tokens * shape.hidden * BYTES[sweep.job.config.model.dtype]
