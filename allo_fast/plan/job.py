"""What a job needs before it starts, the whole of it: memory by kind, traffic, disk and time of every stage, on paper.

Counted from what the stages allocate for a `Shape`. `allo-fast plan CONFIG --gpus N --gpu-memory G`
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from allo_fast.config import GRADIENT_SCORES, Config, SparseTrainConfig, TrainConfig, UserError
from allo_fast.data.verifier import judging_model
from allo_fast.plan.costs import USABLE
from allo_fast.plan.inference import evaluate_phase, rewards_phase, sample_phase
from allo_fast.plan.locating import locate_phase, located_phase
from allo_fast.plan.phase import DEVICES, Job, Phase, kind_of
from allo_fast.plan.rows import unknown_rows
from allo_fast.plan.shapes import BYTES, model_config, shape_of, weights_of
from allo_fast.plan.training import training_phase
from allo_fast.training.zero import Zero, locates_itself, read_zero, trained_ratio, training_sections

logger = logging.getLogger(__name__)

_ORDER = ("pretrain", "sft", "sample", "warmup", "locate", "rewards", "forget", "learn", "evaluate")
_STAGES = (Zero(0), Zero(1), Zero(2), Zero(3))


@dataclass(frozen=True)
class Plan:
    """phases: in the order in which they run. notes: what the numbers stand on."""

    parameters: int
    gpus: int
    gpu_bytes: float
    device: str
    phases: list[Phase]
    disk_bytes: int
    host_bytes: float | None = None  # of a node, where known
    node_bytes: int = 0  # of host memory that a node needs
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.lacking

    @property
    def lacking(self) -> list[Phase]:
        """The phases that do not fit."""
        return [phase for phase in self.phases if not self.holds(phase)]

    def holds(self, phase: Phase) -> bool:
        """Whether device and host have room for it."""
        if phase.device_bytes > USABLE * self.gpu_bytes:
            return False
        return self.host_bytes is None or phase.node_bytes <= USABLE * self.host_bytes

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.times * phase.seconds for phase in self.phases)

    def to_dict(self) -> dict:
        sums = ("device_bytes", "state_bytes", "traffic_bytes", "node_bytes")
        phases = [{**asdict(phase), **{name: getattr(phase, name) for name in sums}} for phase in self.phases]
        peak = {"peak_bytes": self.peak.device_bytes, "peak_stage": self.peak.stage}
        return {**asdict(self), "phases": phases, "fits": self.fits, "seconds": self.seconds, **peak}


def plan_job(job: Job, zeros: Mapping[str, Zero | None]) -> Plan:
    """zeros: how dense and sparse stages run, by "dense" and "sparse"; None: one process without DeepSpeed."""
    phases = phases_of(job, zeros)
    return Plan(
        job.shape.parameters,
        job.gpus,
        job.gpu_bytes,
        job.device.name,
        phases,
        disk_bytes(job.config, job.shape.parameters),
        job.host_bytes,
        max(phase.node_bytes for phase in phases),
        _notes(job, phases),
    )


def job_of(config: Config, gpus: int, gpu_bytes: float, model: str | None = None) -> Job:
    """Of rows that are not read. model: whose configuration stands for the base's. Raises UserError without any."""
    shape = shape_of(model_config(config, model), config.model.dtype)
    job = Job(config, shape, gpus, gpu_bytes, DEVICES["h100"], unknown_rows(config))
    if path := judging_model(config):
        try:
            judge = weights_of(model_config(config, path), config.model.dtype)
            job = replace(job, judging=BYTES[config.model.dtype] * judge.parameters)
        except UserError as error:
            logger.warning("data.scorer: planned without its weights: %s", error)
    if config.rewards.model and config.method == "allo":
        try:
            return replace(job, rewarding=shape_of(model_config(config, config.rewards.model), config.model.dtype))
        except UserError as error:
            logger.warning("rewards.model: planned with the base's weights: %s", error)
    return job


def zeros_of(config: Config, job: Callable[[], Job]) -> dict[str, Zero | None]:
    """How dense and sparse stages run, as `deepspeed` says; job: asked for where it says auto."""
    if config.deepspeed == "auto":
        return chosen(job())
    zero = read_zero(config.deepspeed, config) if config.deepspeed else None
    return {"dense": zero, "sparse": zero}


def chosen(job: Job) -> dict[str, Zero]:
    """For dense and for sparse stages the first of ZeRO 0, 1, 2, 3 that fits; for dense ones also 3 with offload.

    Fewer bytes travel the earlier one stops. The last is returned where nothing fits.
    """
    zeros = {}
    for kind, candidates in {"dense": (*_STAGES, Zero(3, offload=True)), "sparse": _STAGES}.items():
        for zero in candidates:
            zeros[kind] = zero
            if all(phase.device_bytes <= USABLE * job.gpu_bytes for phase in _divided(job, kind, zero)):
                break
    return zeros


def phases_of(job: Job, zeros: Mapping[str, Zero | None]) -> list[Phase]:
    """Of every stage that computes, in the order in which they run."""
    phases = [phase for kind, zero in zeros.items() for phase in _divided(job, kind, zero)]
    frozen = {"sample": sample_phase, "rewards": rewards_phase, "evaluate": evaluate_phase}
    phases += [phase for stage, make in frozen.items() if (phase := make(job, zeros[kind_of(job.config, stage)]))]
    phases = [replace(phase, node_bytes=phase.of_node(job.devices_of_a_node)) for phase in phases]
    return sorted(phases, key=lambda phase: _ORDER.index(phase.stage.partition(".")[0]))


def _divided(job: Job, kind: str, zero: Zero | None) -> list[Phase]:
    """The phases that ZeRO divides among devices: those that train and those that locate; dense or sparse ones."""
    phases, config = [], job.config
    for section, train in training_sections(config).items():
        if kind_of(config, section) == kind:
            if locates_itself(config, section):
                phases.append(located_phase(job, section, train, zero))
            phases.append(training_phase(job, section, train, zero))
    if config.method != "dpo" and kind_of(config, "locate") == kind:
        phases.append(locate_phase(job, zero))
    return phases


def _notes(job: Job, phases: list[Phase]) -> list[str]:
    """What the times, and what is cached, are of."""
    rows, notes = job.rows, []
    for known, count, key in ((rows.train_known, rows.problems, "train"), (rows.test_known, rows.tests, "test")):
        held_out = ", held out of data.train" if key == "test" and job.config.data.test_size else ""
        notes.append(
            f"{count} rows of data.{key}{held_out}" if known else f"data.{key} is not read here: per {count} rows of it"
        )
    if any(phase.scratch_bytes for phase in phases):
        notes.append("scratch: at most; where the disk lacks it, locating runs the whole model in every pass")
    if job.shape.cache_bound:
        notes.append("KV cache: an upper bound, as if every layer kept keys and values of all tokens")
    return notes


def _checkpoints(train: TrainConfig) -> int:
    """How many lie there at least, with the best weights that one knows, and those that are better since."""
    return 3 if getattr(train, "load_best_model_at_end", False) or getattr(train, "guard", None) else 1


def disk_bytes(config: Config, parameters: int) -> int:
    """Of a whole run: models, deltas and selections of every seed and round, and the largest checkpoint or scores
    beside them."""
    sections, count = training_sections(config), parameters
    ratios = {name: trained_ratio(config, name) for name in sections}
    sparse = {name: ratios[name] for name, train in sections.items() if isinstance(train, SparseTrainConfig)}
    entries = [int(ratio * count) for ratio in sparse.values()]
    per_seed = 4 * count if config.warms_up else 0
    per_seed += BYTES[config.model.dtype] * count * sum(map(config.keeps_model, sparse))
    per_seed += 2 * sum(int((ratio or 0) * count) for name, ratio in ratios.items() if name != "sft")  # selections
    # A position and a float32 value each; a stage's delta has those of the stages before it too.
    per_seed += 6 * sum(min(count, sum(entries[:number])) for number in range(1, len(entries) + 1))
    # Scores that a stage makes for itself stay until it ends.
    passing = [
        (12 * (ratio or 1) * _checkpoints(sections[name]) + 4 * locates_itself(config, name)) * count
        for name, ratio in ratios.items()
    ]
    scores = 4 * count if config.method != "dpo" and config.located_by in GRADIENT_SCORES else 0
    sft = 0
    if config.sft:  # its model and, of a sparse one, selection and delta, for all seeds
        sft = BYTES[config.model.dtype] * count + 8 * int((ratios["sft"] or 0) * count)
    return sft + config.rounds * len(config.seeds) * per_seed + int(max([*passing, scores]))
