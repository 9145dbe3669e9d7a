"""The stages that train, as phases: what they hold, send and compute, and how long they take."""

import math
from dataclasses import replace

from allo_fast.config import SparseTrainConfig, TrainConfig
from allo_fast.plan.costs import (
    HEAD_BYTES,
    activation_bytes,
    dense_dpo_states,
    dense_dpo_traffic,
    gathered_bytes,
    states,
    traffic,
)
from allo_fast.plan.phase import Job, Phase, loading, times_of
from allo_fast.plan.rows import example_tokens, examples, micro_batch_tokens, micro_batches, response_tokens, sized_by
from allo_fast.plan.shapes import BYTES, Shape
from allo_fast.training.zero import Zero, trained_ratio


def training_phase(job: Job, section: str, train: TrainConfig, zero: Zero | None) -> Phase:
    """Of one section of the configuration that trains."""
    config, shape, gpus = job.config, job.shape_in(section), job.gpus
    ratio, stage = trained_ratio(config, section), zero.stage if zero else 0
    micros = micro_batches(config, section, train)
    memory = states(shape, config.model.dtype, ratio, zero, gpus, math.ceil(micros / gpus))
    offloaded = memory.pop("host", 0)
    if isinstance(train, SparseTrainConfig) and _clips_all(job, train):
        memory["gradients"] += BYTES["float32"] * shape.parameters
    memory |= {"reference": reference_bytes(job, train, zero)}
    memory |= _transient(job, shape, ratio, zero, micro_batch_tokens(config, section, train))
    if section.startswith("rewards"):  # the trained model scores at last
        memory["activations"] = max(memory["activations"], scoring_tokens(job, section) * shape.forward_bytes)
    trained = shape.parameters if ratio is None else int(ratio * shape.parameters)
    host = loading(BYTES[config.model.dtype] * shape.parameters, stage == 3)
    phase = Phase(
        stage=section,
        placement="dense" if ratio is None else "sharded" if stage == 3 else "resident",
        zero_stage=zero.stage if zero else None,
        memory=memory,
        host={"offloaded": offloaded, **host.get("host", {})},
        host_main={"saving": _saved_bytes(job, section, ratio, trained), **host.get("host_main", {})},
        traffic=traffic(shape, config.model, micros, ratio, zero, gpus),
        flops=2.0
        * _passes(job)
        * shape.parameters
        * train.examples_per_step
        * sum(example_tokens(config, section))
        / gpus,
        dense_dpo_bytes=dense_dpo_states(shape.parameters, zero, gpus),
        dense_dpo_low_bytes=dense_dpo_states(shape.parameters, zero, gpus, low=True),
        dense_dpo_traffic_bytes=dense_dpo_traffic(shape, config.model, micros, zero, gpus),
        checkpoint_bytes=12 * trained,
        times=times_of(config, section),
        sizes=(sized_by(section, train), *_scored_by(section)),
    )
    return _timed(job, phase, section, train)


def _timed(job: Job, phase: Phase, section: str, train: TrainConfig) -> Phase:
    """With the reference's pass over the examples, and the scoring that follows a rewards stage's training."""
    crossing = phase.traffic_bytes + phase.traffic.get("all_reduce", 0)  # a ring sends its bytes twice
    speed = job.device.mfu * job.device.peak_flops
    step_s = phase.flops / speed + crossing / job.bandwidth
    count = examples(job.config, job.rows, section)
    seconds = math.ceil(count / train.examples_per_step) * train.num_train_epochs * step_s
    forward = 2.0 * job.shape_in(section).parameters / (speed * job.gpus)  # seconds a token
    if train.needs_reference:
        seconds += count * sum(example_tokens(job.config, section)) * forward
    if section.startswith("rewards"):
        tokens = scoring_tokens(job, section) // job.config.rewards.batch_size
        seconds += job.rows.wrong * tokens * forward * (2 if section == "rewards.dpo" else 1)
    return replace(phase, step_s=step_s, seconds=seconds)


def reference_bytes(job: Job, train: TrainConfig, zero: Zero | None) -> int:
    """The policy is its own reference; another is freed before the first step, and counted as if it were not."""
    if not (train.needs_reference and getattr(train, "reference", None)):
        return 0
    return BYTES[job.config.model.dtype] * job.shape.parameters // (job.gpus if zero else 1)


def scoring_tokens(job: Job, section: str) -> int:
    """Of a batch of wrong responses behind the prompts that they are scored with, at most."""
    response = response_tokens(job.config)
    prompt = job.config.data.max_prompt_tokens + (0 if section in ("rewards.dpo", "confidence") else 2 * response)
    return job.config.rewards.batch_size * (prompt + response)


def _transient(job: Job, shape: Shape, ratio: float | None, zero: Zero | None, tokens: int) -> dict[str, int]:
    """What lives only within a step."""
    width = BYTES[job.config.model.dtype]
    sharded = zero is not None and zero.sharded
    weight_bytes = 4 if ratio is None else width
    trained = int((ratio or 1) * shape.parameters)
    buckets = 2 if zero and zero.options.get("overlap_comm") else 1  # one is filled while the other travels
    return {
        "activations": activation_bytes(shape, job.config.model, tokens),
        "transient dW": weight_bytes * max(shape.sizes),
        # Of whole float32 weights autocast keeps a copy each for backward; sharded ones are cast at every use.
        "bfloat16 copies": 2 * shape.parameters if ratio is None and width == 2 and not sharded else 0,
        "reduce buckets": 0 if zero is None or sharded else 4 * buckets * zero.bucket_size(trained),
        "head workspace": HEAD_BYTES,
        "gathered weights": gathered_bytes(shape, zero, weight_bytes) if sharded else 0,
    }


def _saved_bytes(job: Job, section: str, ratio: float | None, trained: int) -> int:
    """The larger of a checkpoint and of what the stage passes on, which rank 0 holds while it is written."""
    config, weights = job.config, job.shape_in(section).parameters
    if section.startswith("rewards"):
        return 12 * trained
    if ratio is None:
        return 12 * weights
    whole = section == "sft" or config.keeps_model(section)
    return max(12 * trained, BYTES[config.model.dtype] * weights if whole else 6 * trained)


def _passes(job: Job) -> int:
    """Forward, backward (two), perhaps forward again."""
    return 4 if job.config.model.gradient_checkpointing else 3


def _clips_all(job: Job, train: SparseTrainConfig) -> bool:
    return (train.clip or ("all" if job.config.protocol == "release" else "selected")) == "all"


def _scored_by(section: str) -> tuple[str, ...]:
    return ("rewards.batch_size",) if section.startswith("rewards") else ()
