"""What to change where a job does not fit: each change is tried on paper before it is named."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from allo_fast.config import Config, UserError
from allo_fast.plan.costs import USABLE
from allo_fast.plan.job import Plan, chosen, plan_job
from allo_fast.plan.phase import Job, Phase
from allo_fast.plan.rows import example_tokens
from allo_fast.training.zero import Zero, check_divides, training_sections

Zeros = Mapping[str, Zero | None]
_MOST_DEVICES = 1024


@dataclass(frozen=True)
class _Change:
    """What to do, the kind of thing that is, and the job after it."""

    kind: str
    words: str
    job: Job
    zeros: Zeros


def advised(job: Job, zeros: Zeros) -> Plan:
    """The plan, with a line for each stage that lacks room: the first change, else the first two, that make enough."""
    plan = plan_job(job, zeros)
    lines = [f"{phase.stage}: {_lack(plan, phase)}; {_remedy(phase, job, zeros)}" for phase in plan.lacking]
    return replace(plan, advice=lines)


def fitted(job: Job, zeros: Zeros) -> Job | None:
    """The job after changes of its own settings, stage by stage, that make every one fit; None where none do."""
    while lacking := plan_job(job, zeros).lacking:
        changes = _found(lacking[0], _Change("", "", job, zeros), lambda at: ())
        if not changes:
            return None
        job = changes[-1].job
    return job


def _lack(plan: Plan, phase: Phase) -> str:
    missing = phase.device_bytes - USABLE * plan.gpu_bytes
    if missing > 0:
        return f"{missing / 1e9:.1f} GB too much for a device"
    return f"{(phase.node_bytes - USABLE * plan.host_bytes) / 1e9:.1f} GB too much for a node's host memory"


def _remedy(phase: Phase, job: Job, zeros: Zeros) -> str:
    """From what costs least, to more devices, to larger ones."""
    start = _Change("", "", job, zeros)
    for others in (lambda at: (), _devices):
        if changes := _found(phase, start, others):
            return ", and ".join(change.words for change in changes)
    return _larger(phase, start)


def _found(phase: Phase, start: _Change, others: Callable[[_Change], Iterable[_Change]]) -> list[_Change]:
    """The first change that makes enough room, else the first two, the second one made of the first; or none."""
    singles = [*_changes(phase, start), *others(start)]
    for change in singles:
        if _enough(phase, change):
            return [change]
    for first in {change.kind: change for change in singles}.values():  # of each kind the strongest
        for second in (*_changes(phase, first), *others(first)):
            if second.kind != first.kind and _enough(phase, second):
                return [first, second]
    return []


def _enough(phase: Phase, change: _Change) -> bool:
    plan = plan_job(change.job, change.zeros)
    return all(plan.holds(other) for other in plan.phases if other.stage == phase.stage)


def _changes(phase: Phase, at: _Change) -> Iterator[_Change]:
    config = at.job.config
    if not config.model.gradient_checkpointing and phase.stage not in ("sample", "evaluate", "rewards"):
        yield _set(at, "checkpointing", {"model.gradient_checkpointing": True})
    for keys in dict.fromkeys([*((key,) for key in phase.sizes), phase.sizes]):
        yield from _smaller(at, keys)
    if phase.windows:
        yield from _windows(at)
    if at.job.gpus > 1:
        yield from _zeros(phase, at)


def _smaller(at: _Change, keys: tuple[str, ...]) -> Iterator[_Change]:
    """Less at once; of a micro-batch, in more of them, so that the step is the same."""
    for divisor in (2**power for power in range(1, 12)):
        changes = {}
        for key in keys:
            section, name = key.rsplit(".", 1)
            if _get(at.job.config, key) % divisor:
                return
            changes[key] = _get(at.job.config, key) // divisor
            if name == "max_tokens_per_batch" and changes[key] < sum(example_tokens(at.job.config, section)):
                return  # which would set examples aside
            if name == "per_device_train_batch_size":
                steps = f"{section}.gradient_accumulation_steps"
                changes[steps] = _get(at.job.config, steps) * divisor
        yield _set(at, " ".join(keys), changes)


def _windows(at: _Change) -> Iterator[_Change]:
    if at.job.config.locate.windows != "auto":
        yield _set(at, "windows", {"locate.windows": "auto"})
    other = "host" if at.job.config.locate.accumulators == "device" else "device"
    yield _set(at, "accumulators", {"locate.accumulators": other})


def _zeros(phase: Phase, at: _Change) -> Iterator[_Change]:
    """The shipped JSONs that divide more than the stage's own."""
    zeros = [Zero(number) for number in range((phase.zero_stage or 0) + 1, 4)]
    for zero in [*zeros, *([Zero(3, offload=True)] if phase.placement == "dense" else [])]:
        path = f"configs/zero{zero.stage}{'_offload' if zero.offload else ''}.json"
        job = replace(at.job, config=at.job.config.model_copy(update={"deepspeed": path}))
        yield _Change("zero", f"set deepspeed={path}", job, dict.fromkeys(at.zeros, zero))


def _devices(at: _Change) -> Iterator[_Change]:
    """Twice as many, and so on; where the steps can be divided among them."""
    count = at.job.gpus
    while (count := 2 * count) <= _MOST_DEVICES:
        if _divides(at.job.config, count):
            words, job = f"take {count} devices", replace(at.job, gpus=count)
            automatic = at.job.config.deepspeed in (None, "auto")
            if at.job.config.deepspeed is None:
                words += " with deepspeed=auto"
            yield _Change("devices", words, job, chosen(job) if automatic else at.zeros)


def _divides(config: Config, count: int) -> bool:
    try:
        for name, train in training_sections(config).items():
            check_divides(train, count, name)
    except UserError:
        return False
    return True


def _larger(phase: Phase, at: _Change) -> str:
    """The memory that would do."""
    words, device = [], at.job.gpu_bytes
    while not _enough(phase, replace(at, job=replace(at.job, gpu_bytes=device, host_bytes=None))):
        device *= 1.05
    if device > at.job.gpu_bytes:
        words = [f"devices with {math.ceil(device / 1e9)} GB"]
    if at.job.host_bytes is not None and phase.node_bytes > USABLE * at.job.host_bytes:
        words.append(f"nodes with {math.ceil(phase.node_bytes / USABLE / 1e9)} GB of host memory")
    return "take " + " and ".join(words)


def _set(at: _Change, kind: str, changes: Mapping[str, object]) -> _Change:
    words = "set " + " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    settings = at.job.config.model_dump()
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = settings
        for parent in parents:
            section = section[parent]
        section[last] = value
    job = replace(at.job, config=Config.model_validate(settings))
    return _Change(kind, words, job, chosen(job) if job.config.deepspeed == "auto" else at.zeros)


def _get(config: Config, key: str) -> int:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
