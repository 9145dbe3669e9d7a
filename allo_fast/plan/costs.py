"""Bytes that a training stage holds and sends, by what the backends allocate; `benchmarks zero` measures both."""

import math

from allo_fast.config import ModelConfig
from allo_fast.plan.shapes import BYTES, Shape, Weights
from allo_fast.training.zero import PERSISTENT, Zero
from allo_kernels.head_parts import workspace_bytes
from allo_kernels.positions import blocks_of

USABLE = 0.92  # of a device's or node's memory; the rest is the CUDA context, NCCL's buffers and fragmentation
HEAD_BYTES = workspace_bytes(2)  # the head's, in bfloat16: tiles of logits and what is made of them


def states(
    shape: Shape, dtype: str, ratio: float | None, zero: Zero | None, world: int, micros: int = 2
) -> dict[str, int]:
    """Bytes per device by kind; `host`: those that are offloaded. ratio None: every weight trains, in float32.

    micros: micro-batches of a step on each rank.
    """
    stage, shared = (zero.stage, world) if zero else (0, 1)
    trained = [size if ratio is None else int(ratio * size) for size in shape.sizes]
    count, part = sum(trained), sum(math.ceil(size / shared) for size in trained)
    flat = math.ceil(count / (2 * shared)) * 2  # ZeRO-1/2 cut one flat vector, aligned to two per rank
    share = {0: count, 1: flat, 2: flat, 3: part}[stage]
    base_bytes = 4 if ratio is None else BYTES[dtype]
    base_share = sum(math.ceil(size / shared) for size in shape.sizes) if stage == 3 else shape.parameters
    memory = {"base": base_bytes * base_share}
    if ratio is not None:
        low = sum(math.ceil(2 * size / shared) for size in trained) if stage == 3 else 2 * count
        memory["positions"] = low + 8 * sum(blocks_of(size) + 1 for size in shape.sizes)
        memory["originals"] = 0 if stage == 3 else base_bytes * count
        memory["values"] = 4 * (part if stage == 3 else flat * shared if stage else count)
    optimizer = {"master": 4 * share if stage else 0, "moments": 8 * share}
    # ZeRO-1 keeps all until the last micro-batch; ZeRO-3 keeps its share, and copies it for the optimizer.
    gradients = {0: 4 * count, 1: 4 * (count if micros > 1 else share), 2: 4 * share, 3: 8 * share}[stage]
    if zero and zero.offload:
        room = 4 * max(trained)  # of one weight, on both sides, for what ZeRO-1/2 bring over
        values = room + 4 * share  # and their copy of the values
        summed = 4 * share if micros > 1 else 0  # where ZeRO-2 adds up micro-batches
        beside = {1: values, 2: values + summed, 3: 4 * share}[stage]
        memory["host"] = sum(optimizer.values()) + 4 * share + beside
        gradients = {1: room + (4 * count if micros > 1 else 0), 2: room, 3: 0}[stage]
    else:
        memory |= optimizer
    memory["gradients"] = gradients
    memory["buckets"] = 4 * zero.bucket_size(count) if stage == 3 else 0
    return memory


def activation_bytes(shape: Shape, model: ModelConfig, tokens: int) -> int:
    """What a forward pass keeps for its backward pass; tokens: padding included."""
    layers, inputs = shape.layers * shape.layer_bytes, shape.layers * shape.hidden * BYTES[model.dtype]
    return tokens * ((inputs + shape.layer_bytes if model.gradient_checkpointing else layers) + shape.others_bytes)


def gathered_bytes(shape: Shape, zero: Zero | None, width: int) -> int:
    """Of the weights that ZeRO-3 has whole at once; zero: None where nothing trains, and DeepSpeed's defaults hold."""
    return width * min(shape.parameters, int(zero.options.get("stage3_max_live_parameters", 10**9)) if zero else 10**9)


def traffic(
    weights: Weights, model: ModelConfig, micros: int, ratio: float | None, zero: Zero | None, world: int
) -> dict[str, int]:
    """Bytes that a device hands to collectives per step of `micros` micro-batches; of in- and output the larger counts.

    ZeRO-1 reduces once a step; ZeRO-2 and 3 with every micro-batch; ZeRO-3 gathers in forward and again in backward
    what is too large to stay. ratio None: every weight trains, in float32.
    """
    if zero is None or world == 1:
        return {}
    micros = math.ceil(micros / world)
    trained = [size if ratio is None else int(ratio * size) for size in weights.sizes]
    count = sum(trained)
    if zero.stage < 3:
        reduced = 4 * count * (1 if zero.stage < 2 else micros)
        return {"all_reduce": reduced, "all_gather": 4 * count if zero.stage else 0}
    persistent, gathered = int(zero.options.get(PERSISTENT, 100_000)), 0
    for size, selected, passes in zip(weights.sizes, trained, _passes(weights, model), strict=True):
        parts = [(selected, 4)] if ratio is None else [(size, BYTES[model.dtype]), (2 * selected, 1), (selected, 4)]
        for entries, width in parts:  # small ones once a step, others around each use
            gathered += entries * width * (1 if entries <= persistent else passes * micros)
    return {"reduce_scatter": 4 * count * micros, "all_gather": gathered}


def _passes(weights: Weights, model: ModelConfig) -> list[int]:
    """How often a micro-batch needs each weight: forward, backward, perhaps to compute activations again."""
    return [3 if again and model.gradient_checkpointing else 2 for again in weights.recomputed]


def dense_dpo_states(parameters: int, zero: Zero | None, world: int, low: bool = False) -> int:
    """What others need: bfloat16 weights, gradients and reference (2 bytes each), float32 master and moments (12).

    low: DeepSpeed's bfloat16 master weights and optimizer states instead: no master, and moments of 2 bytes each.
    """
    stage, optimizer = zero.stage if zero else 0, 4 if low else 12
    every = 6 + optimizer
    shared = {0: 0, 1: optimizer, 2: optimizer + 2, 3: every}[stage]
    return parameters * (every - shared) + parameters * shared // world


def dense_dpo_traffic(weights: Weights, model: ModelConfig, micros: int, zero: Zero | None, world: int) -> int:
    """Of the same in bfloat16; under ZeRO-3 the reference is gathered for its forward pass too."""
    if zero is None or world == 1:
        return 0
    micros = math.ceil(micros / world)
    if zero.stage < 3:
        return 2 * weights.parameters * ((1 if zero.stage < 2 else micros) + (1 if zero.stage else 0))
    passes = [number + 2 for number in _passes(weights, model)]  # with the reference's, and the gradient's
    return 2 * sum(size * number for size, number in zip(weights.sizes, passes, strict=True)) * micros
