"""What a job needs before it starts: memory by kind, traffic, disk and time, per device and stage, on paper.

Counted from what the backends allocate for a `Shape`. `allo-fast plan CONFIG --gpus N --gpu-memory G`
"""

import math
from dataclasses import asdict, dataclass, field, replace

from allo_fast.config import Config, SparseTrainConfig, TrainConfig
from allo_fast.plan.costs import dense_dpo_states, dense_dpo_traffic, states, traffic
from allo_fast.plan.shapes import BYTES, Shape
from allo_fast.training.zero import Zero, trained_ratio, training_sections
from allo_kernels.token_logps import CHUNK_BYTES

USABLE = 0.92  # of a device's memory; the rest is the CUDA context, NCCL's buffers and fragmentation


@dataclass(frozen=True)
class Device:
    """What step times are estimated from. flops: dense bf16 at the assumed utilisation `mfu` of the peak."""

    name: str
    peak_flops: float  # per second
    node_bytes_per_s: float  # to another device of the node, per direction
    network_bytes_per_s: float  # to another node, per device and direction
    per_node: int = 8
    mfu: float = 0.4


DEVICES = {
    "h100": Device("H100", 989e12, 450e9, 50e9),
    "a100": Device("A100", 312e12, 300e9, 25e9),
}


@dataclass(frozen=True)
class Phase:
    """One stage on one placement: bytes of device memory by kind, and per step what it sends and computes."""

    stage: str
    placement: str  # dense, resident or sharded; of locating, whole or shares
    zero_stage: int | None
    memory: dict[str, int]
    host_bytes: int = 0  # offloaded states, per device
    traffic: dict[str, int] = field(default_factory=dict)  # bytes for collectives per step and device, by operation
    flops: float = 0.0  # per step and device
    checkpoint_bytes: int = 0
    dense_dpo_bytes: int = 0  # states of dense DPO in bfloat16 with a reference copy, under the same stage
    dense_dpo_traffic_bytes: int = 0
    step_s: float = 0.0

    @property
    def traffic_bytes(self) -> int:
        return sum(self.traffic.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def state_bytes(self) -> int:
        """Of what lives between steps and the gradients; not activations, gathered weights or workspaces."""
        return sum(size for kind, size in self.memory.items() if kind not in TRANSIENT)


_LOCATING = 16  # bytes an entry of one weight's share: both models' in float32, their difference, masks, counted ties
TRANSIENT = (
    "locating",
    "reference",
    "activations",
    "transient dW",
    "bfloat16 copies",
    "reduce buckets",
    "head workspace",
    "gathered weights",
)


@dataclass(frozen=True)
class Plan:
    parameters: int
    gpus: int
    gpu_bytes: float
    device: str
    phases: list[Phase]
    disk_bytes: int
    advice: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return all(phase.device_bytes <= USABLE * self.gpu_bytes for phase in self.phases)

    def to_dict(self) -> dict:
        sums = ("device_bytes", "state_bytes", "traffic_bytes")
        phases = [{**asdict(phase), **{name: getattr(phase, name) for name in sums}} for phase in self.phases]
        return {**asdict(self), "phases": phases, "fits": self.fits}


def make_plan(
    config: Config,
    shape: Shape,
    zeros: dict[str, Zero | None],
    *,
    gpus: int,
    gpu_bytes: float,
    device: Device,
) -> Plan:
    """zeros: how dense and sparse stages train, by "dense" and "sparse"; None: one process without DeepSpeed."""
    phases = [phase for kind in zeros for phase in _phases(config, shape, kind, zeros[kind], gpus)]
    phases = [_timed(phase, gpus, device) for phase in phases]
    plan = Plan(shape.parameters, gpus, gpu_bytes, device.name, phases, disk_bytes(config, shape.parameters))
    return plan if plan.fits else replace(plan, advice=_advice(plan, config))


def choose(config: Config, shape: Shape, gpus: int, gpu_bytes: float) -> dict[str, Zero]:
    """`deepspeed: auto`: for dense and for sparse stages the first of ZeRO 0, 1, 2, 3 that fits; for dense ones also
    3 with offload.

    Fewer bytes travel the earlier one stops. The last is returned where nothing fits.
    """
    zeros, stages = {}, (Zero(0), Zero(1), Zero(2), Zero(3))
    for kind, candidates in {"dense": (*stages, Zero(3, offload=True)), "sparse": stages}.items():
        for zero in candidates:
            phases = _phases(config, shape, kind, zero, gpus)
            zeros[kind] = zero
            if all(phase.device_bytes <= USABLE * gpu_bytes for phase in phases):
                break
    return zeros


def _phases(config: Config, shape: Shape, kind: str, zero: Zero | None, gpus: int) -> list[Phase]:
    """The stages that train densely, with the locating that follows; or those that train what it selected."""
    phases = [
        _phase(config, shape, name, train, zero, gpus)
        for name, train in training_sections(config).items()
        if (trained_ratio(config, name) is not None) == (kind == "sparse") and name != "pretrain"
    ]
    return phases + ([_locate(config, shape, zero, gpus)] if kind == "dense" and config.method != "dpo" else [])


def _locate(config: Config, shape: Shape, zero: Zero | None, gpus: int) -> Phase:
    """The base, and where a change is ranked the model that it leads to, in float32."""
    part = gpus if zero and zero.sharded else 1
    memory = {"base": BYTES[config.model.dtype] * shape.parameters // part}
    if config.located_by in ("delta", "after"):
        memory["after"] = 4 * shape.parameters // part
    placement = "shares" if part > 1 else "whole"
    memory["locating"] = _LOCATING * math.ceil(max(shape.sizes) / gpus)
    return Phase("locate", placement, zero and zero.stage, memory)


def _phase(config: Config, shape: Shape, name: str, train: TrainConfig, zero: Zero | None, gpus: int) -> Phase:
    ratio = trained_ratio(config, name)
    stage = zero.stage if zero else 0
    micro_tokens, step_tokens = _tokens(config, name, train)
    micros = train.gradient_accumulation_steps
    memory = states(shape, config.model.dtype, ratio, zero, gpus, math.ceil(micros / gpus))
    host = memory.pop("host", 0)
    # The policy is its own reference; another one is freed before the first step, and counted as if it were not.
    other = BYTES[config.model.dtype] * shape.parameters // gpus if getattr(train, "reference", None) else 0
    memory |= {"reference": other, **_transient(config, shape, ratio, zero, micro_tokens)}
    passes = 4 if config.model.gradient_checkpointing else 3  # forward, backward (two), perhaps forward again
    return Phase(
        stage=name,
        placement="dense" if ratio is None else "sharded" if stage == 3 else "resident",
        zero_stage=zero.stage if zero else None,
        memory=memory,
        host_bytes=host,
        traffic=traffic(shape, config.model, micros, ratio, zero, gpus),
        flops=2.0 * passes * shape.parameters * step_tokens / gpus,
        dense_dpo_bytes=dense_dpo_states(shape.parameters, zero, gpus),
        dense_dpo_traffic_bytes=dense_dpo_traffic(shape, config.model, micros, zero, gpus),
        checkpoint_bytes=12 * (shape.parameters if ratio is None else int(ratio * shape.parameters)),
    )


def _transient(config: Config, shape: Shape, ratio: float | None, zero: Zero | None, tokens: int) -> dict[str, int]:
    """What lives only within a step."""
    width = BYTES[config.model.dtype]
    layers, inputs = shape.layers * shape.layer_bytes, shape.layers * shape.hidden * width
    saved_bytes = inputs + shape.layer_bytes if config.model.gradient_checkpointing else layers
    sharded = zero is not None and zero.sharded
    weight_bytes = 4 if ratio is None else width
    trained = int((ratio or 1) * shape.parameters)
    buckets = 2 if zero and zero.options.get("overlap_comm") else 1  # one is filled while the other travels
    return {
        "activations": tokens * (saved_bytes + shape.others_bytes),
        "transient dW": weight_bytes * max(shape.sizes),
        # Of whole float32 weights autocast keeps a copy each for backward; sharded ones are cast at every use.
        "bfloat16 copies": 2 * shape.parameters if ratio is None and width == 2 and not sharded else 0,
        "reduce buckets": 0 if zero is None or sharded else 4 * buckets * zero.bucket_size(trained),
        "head workspace": 3 * CHUNK_BYTES["cuda"],
        "gathered weights": weight_bytes * min(shape.parameters, _live(zero)) if sharded else 0,
    }


def _live(zero: Zero) -> int:
    return int(zero.options.get("stage3_max_live_parameters", 10**9))


def _tokens(config: Config, name: str, train: TrainConfig) -> tuple[int, int]:
    """At most, of one micro-batch and of a step: the longest allowed prompt with its responses."""
    prompt, response = config.data.max_prompt_tokens, config.data.max_response_tokens
    if name == "rewards.train":
        example = prompt + 3 * response
    else:
        example = prompt + (response if name in ("sft", "forget") else 2 * response)
    micro = train.per_device_train_batch_size * example
    return micro, micro * train.gradient_accumulation_steps


def _timed(phase: Phase, gpus: int, device: Device) -> Phase:
    bandwidth = device.node_bytes_per_s if gpus <= device.per_node else device.network_bytes_per_s
    crossing = phase.traffic_bytes + phase.traffic.get("all_reduce", 0)  # a ring sends its bytes twice
    seconds = phase.flops / (device.mfu * device.peak_flops) + crossing / bandwidth
    return replace(phase, step_s=seconds)


def disk_bytes(config: Config, parameters: int) -> int:
    """Of a whole run: models, deltas and selections of every seed, and the largest checkpoint."""
    sections, count = training_sections(config), parameters
    sparse = {name: train.ratio for name, train in sections.items() if isinstance(train, SparseTrainConfig)}
    entries = [int(ratio * count) for ratio in sparse.values()]
    per_seed = 4 * count if config.warms_up else 0
    per_seed += BYTES[config.model.dtype] * count * sum(map(config.keeps_model, sparse))
    per_seed += 2 * sum(entries)  # selections
    # A position and a float32 value each; a stage's delta has those of the stages before it too.
    per_seed += 6 * sum(min(count, sum(entries[:number])) for number in range(1, len(entries) + 1))
    largest = max((trained_ratio(config, name) or 1 for name in sections), default=0)
    sft = 0
    if config.sft:  # its model and, of a sparse one, selection and delta, for all seeds
        sft = BYTES[config.model.dtype] * count + 8 * int((trained_ratio(config, "sft") or 0) * count)
    return sft + len(config.seeds) * per_seed + int(12 * largest * count)


def _advice(plan: Plan, config: Config) -> list[str]:
    """What to change, for each stage that does not fit."""
    advice = []
    for phase in plan.phases:
        missing = phase.device_bytes - USABLE * plan.gpu_bytes
        if missing <= 0:
            continue
        activations = phase.memory.get("activations", 0)
        if activations > missing and not config.model.gradient_checkpointing:
            fix = "set model.gradient_checkpointing=true"
        elif activations > missing:
            fix = f"lower {phase.stage}.per_device_train_batch_size or data.max_response_tokens"
        elif phase.zero_stage != 3 and plan.gpus > 1:
            fix = "set deepspeed=configs/zero3.json"
        elif phase.zero_stage == 3 and not phase.host_bytes and phase.placement == "dense":
            fix = "set deepspeed=configs/zero3_offload.json"
        else:
            fix = f"take more devices: {math.ceil(plan.gpus * phase.device_bytes / (USABLE * plan.gpu_bytes))} or more"
        advice.append(f"{phase.stage}: {missing / 1e9:.1f} GB too much; {fix}")
    return advice


def table(plan: Plan) -> str:
    """The plan as text."""
    head = f"{plan.parameters / 1e9:.2f}B weights on {plan.gpus} x {plan.device} with {plan.gpu_bytes / 1e9:.0f} GB"
    kinds = dict.fromkeys(kind for phase in plan.phases for kind in phase.memory)
    kinds = sorted(kinds, key=lambda kind: kind in TRANSIENT)
    names = [f"{'GB per device':<22}", *(f"{phase.stage:>14}" for phase in plan.phases)]
    lines = [head, "".join(names)]
    lines.append("".join([f"{'placement':<22}", *(f"{_place(phase):>14}" for phase in plan.phases)]))
    for kind in kinds:
        lines.append(f"{kind:<22}" + "".join(f"{_gb(phase.memory.get(kind, 0)):>14}" for phase in plan.phases))
    rows = {
        "sum": [_gb(phase.device_bytes) for phase in plan.phases],
        "states": [_gb(phase.state_bytes) for phase in plan.phases],
        "states of dense DPO": [_gb(phase.dense_dpo_bytes) for phase in plan.phases],
        "host memory / device": [_gb(phase.host_bytes) for phase in plan.phases],
        "traffic / step": [_gb(phase.traffic_bytes) for phase in plan.phases],
        "traffic of dense DPO": [_gb(phase.dense_dpo_traffic_bytes) for phase in plan.phases],
        "PFLOP / step": [f"{phase.flops / 1e15:.1f}" if phase.flops else "-" for phase in plan.phases],
        "seconds / step": [f"{phase.step_s:.1f}" if phase.step_s else "-" for phase in plan.phases],
        "checkpoint": [_gb(phase.checkpoint_bytes) for phase in plan.phases],
    }
    lines += [f"{name:<22}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows.items()]
    lines.append(f"disk of the run: {plan.disk_bytes / 1e9:.1f} GB")
    lines.append(
        "dense DPO: bfloat16 weights, gradients and reference, float32 master and moments (18 bytes), same stage"
    )
    most = max(phase.device_bytes for phase in plan.phases)
    lines += plan.advice or [f"fits: {most / 1e9:.1f} of {USABLE * plan.gpu_bytes / 1e9:.1f} usable GB"]
    return "\n".join(lines)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}" if count else "-"


def _place(phase: Phase) -> str:
    return phase.placement if phase.zero_stage is None else f"{phase.placement} Z{phase.zero_stage}"
