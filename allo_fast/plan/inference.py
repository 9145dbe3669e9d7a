"""Sampling, scoring and evaluating as phases: a frozen model, what is cached of its responses, and its logits."""

import math
from dataclasses import dataclass

from allo_fast.config import SAMPLED, EvaluateConfig, SampleConfig
from allo_fast.model.decoding import BLOCK, PROMPT_TOKENS
from allo_fast.plan.costs import HEAD_BYTES, gathered_bytes
from allo_fast.plan.phase import Job, Phase, loading, times_of
from allo_fast.plan.shapes import BYTES, Shape
from allo_fast.plan.training import scoring_tokens
from allo_fast.training.reference import TOKENS
from allo_fast.training.zero import Zero

_LOGIT_BYTES = 48  # of an entry: float32, by the temperature, and where all are as likely sorted, with index and sums


@dataclass(frozen=True)
class _Work:
    """What a frozen model does: bytes beside it by kind, seconds, and its forward passes one after another."""

    memory: dict[str, int]
    seconds: float
    passes: int


def sample_phase(job: Job, zero: Zero | None) -> Phase | None:
    """None where responses are given, or a server samples them."""
    settings = job.config.sample
    if job.config.data.format not in SAMPLED or settings.engine == "server":
        return None
    work = _generating(job, zero, settings, settings.num_return_sequences, job.rows.problems)
    return _frozen(job, "sample", zero, work, times_of(job.config, "sample"))


def evaluate_phase(job: Job, zero: Zero | None) -> Phase:
    """Of one model; a run evaluates the base, the given one where that is another, and what each seed aligns."""
    config, settings, rows = job.config, job.config.evaluate, job.rows
    if config.generates_answers:
        work = _generating(job, zero, settings, settings.num_return_sequences, rows.tests)
    else:
        row = config.data.max_prompt_tokens + rows.options * config.data.max_response_tokens
        tokens = max(TOKENS, row)
        work = _scoring(job, job.shape, tokens, math.ceil(rows.tests * row / tokens))
    first = 1 + bool(config.sft) + len(config.trained) * len(config.seeds)
    later = 2 * len(config.seeds) * (config.rounds - 1)  # the model before and the one after
    return _frozen(job, "evaluate", zero, work, first + later)


def rewards_phase(job: Job, zero: Zero | None) -> Phase | None:
    """Of what trains nothing; None where rewards are given, or come out of training."""
    source = job.config.reward_source
    if source not in ("confidence", "prompted") or job.config.method != "allo":
        return None
    tokens = scoring_tokens(job, source)
    row = tokens // job.config.rewards.batch_size
    if source == "confidence":  # whose passes are the reference's
        tokens = max(TOKENS, row)
    batches = math.ceil(job.rows.wrong * row / tokens)
    work = _scoring(job, job.shape_in("rewards"), tokens, batches)
    return _frozen(job, "rewards", zero, work, times_of(job.config, "rewards"))


def _scoring(job: Job, shape: Shape, tokens: int, batches: int) -> _Work:
    """Log-probabilities of so many tokens at once."""
    memory = {"activations": tokens * shape.forward_bytes, "head workspace": HEAD_BYTES}
    passes = math.ceil(batches / job.gpus)
    return _Work(memory, passes * 2.0 * shape.parameters * tokens / (job.device.mfu * job.device.peak_flops), passes)


def _generating(
    job: Job, zero: Zero | None, settings: SampleConfig | EvaluateConfig, responses: int, problems: int
) -> _Work:
    """So many responses to each of `batch_size` problems at once, all as long as they may be."""
    shape, prompt, new, device = job.shape, job.config.data.max_prompt_tokens, settings.max_new_tokens, job.device
    whole, sequences = BYTES[job.config.model.dtype] * shape.parameters, settings.batch_size * responses
    positions = prompt + new
    if shape.cache_bound or _is_shared(job, zero, whole):  # padded, each with its prompt
        together, entering, computed = sequences, 0, sequences
    else:  # a prompt once for all of its own, some short ones together, kept until all have entered
        together = entering = min(settings.batch_size, max(1, PROMPT_TOKENS // prompt))
        positions, computed = math.ceil(positions / BLOCK) * BLOCK, settings.batch_size
    # A layer's keys grow by a copy of themselves.
    cache = shape.cache_bytes * positions * sequences * (2 * shape.layers + 1) // (2 * shape.layers)
    memory = {
        "KV cache": cache + shape.cache_bytes * entering * prompt,
        "activations": together * prompt * shape.forward_bytes,
        "logits": _LOGIT_BYTES * sequences * shape.vocabulary,
    }
    read = whole + cache / 2  # by every token, in the mean
    token_s = max(read / (device.mbu * device.memory_bytes_per_s), device.layer_s * shape.layers)
    prompt_s = 2.0 * shape.parameters * computed * prompt / (device.mfu * device.peak_flops)
    rounds = math.ceil(math.ceil(problems / settings.batch_size) / job.gpus)
    seconds = rounds * (prompt_s + new * token_s)
    if job.judging:  # a pass for each response
        memory["reward model"] = job.judging
        flops = 2.0 * job.judging / BYTES[job.config.model.dtype] * (prompt + new)
        judged_s = max(flops / (device.mfu * device.peak_flops), job.judging / (device.mbu * device.memory_bytes_per_s))
        seconds += math.ceil(problems / job.gpus) * responses * judged_s
    return _Work(memory, seconds, rounds * (new + 1))


def _is_shared(job: Job, zero: Zero | None, whole: int) -> bool:
    """A model of so many bytes, as `stages.models.inference` decides."""
    return zero is not None and job.gpus > 1 and whole > job.gpu_bytes / 2


def _frozen(job: Job, stage: str, zero: Zero | None, work: _Work, times: int) -> Phase:
    shape, width = job.shape_in(stage), BYTES[job.config.model.dtype]
    whole = width * shape.parameters
    shared = _is_shared(job, zero, whole)
    memory, seconds = {"base": whole, **work.memory}, work.seconds
    if shared:
        memory |= {"base": math.ceil(whole / job.gpus), "gathered weights": gathered_bytes(shape, None, width)}
        seconds += work.passes * whole / job.bandwidth
    return Phase(
        stage=stage,
        placement="shares" if shared else "whole",
        zero_stage=3 if shared else None,
        memory=memory,
        seconds=seconds,
        times=times,
        sizes=(f"{stage}.batch_size",),
        **loading(whole, shared),
    )
