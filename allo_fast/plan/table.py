"""A plan as text."""

from allo_fast.plan.costs import USABLE
from allo_fast.plan.job import Plan
from allo_fast.plan.phase import HOST, TRANSIENT, Phase

_NAME, _CELL = 31, 15
_RIVALS = """dense DPO: states, under the stage's ZeRO. fp32 master, 18 bytes a weight: bfloat16 weights, gradients
and reference, float32 master and moments; all-bf16 optimizer, 10: moments in bfloat16 and no master"""


def table(plan: Plan) -> str:
    head = f"{plan.parameters / 1e9:.2f}B weights on {plan.gpus} x {plan.device} with {plan.gpu_bytes / 1e9:.0f} GB"
    rows = {"GB per device": [phase.stage for phase in plan.phases], "placement": [_place(p) for p in plan.phases]}
    rows |= {kind: [_gb(phase.memory.get(kind, 0)) for phase in plan.phases] for kind in _kinds(plan)}
    rows |= {name: cells for name, cells in _sums(plan).items() if set(cells) != {"-"}}
    lines = [
        head,
        *(f"{name:<{_NAME}}" + "".join(f"{cell:>{_CELL}}" for cell in cells) for name, cells in rows.items()),
    ]
    return "\n".join([*lines, *plan.notes, _RIVALS, summary(plan), *plan.advice])


def summary(plan: Plan) -> str:
    """The whole job in one line."""
    usable, fits = USABLE * plan.gpu_bytes / 1e9, "fits" if plan.fits else "does not fit"
    host = f" of {USABLE * plan.host_bytes / 1e9:.0f}" if plan.host_bytes else ""
    scratch = max(phase.scratch_bytes for phase in plan.phases)
    parts = [
        f"the whole job {fits}: {plan.peak.device_bytes / 1e9:.1f} of {usable:.1f} GB a device ({plan.peak.stage})",
        *(f"{phase.stage} in {phase.windows} windows, {phase.passes} passes" for phase in plan.phases if phase.windows),
        f"at most {_time(plan.seconds)}",
        f"host memory {plan.node_bytes / 1e9:.0f}{host} GB a node",
        f"disk {plan.disk_bytes / 1e9:.0f} GB" + (f" and {scratch / 1e9:.0f} of scratch" if scratch else ""),
    ]
    return "; ".join(parts)


def _kinds(plan: Plan) -> list[str]:
    """Of memory, those that are there, states first."""
    kinds = dict.fromkeys(kind for phase in plan.phases for kind, size in phase.memory.items() if size)
    return sorted(kinds, key=lambda kind: kind in TRANSIENT)


def _sums(plan: Plan) -> dict[str, list[str]]:
    phases = plan.phases
    return {
        "sum": [_gb(phase.device_bytes) for phase in phases],
        "states": [_gb(phase.state_bytes) for phase in phases],
        "dense DPO, fp32 master": [_gb(phase.dense_dpo_bytes) for phase in phases],
        "dense DPO, all-bf16 optimizer": [_gb(phase.dense_dpo_low_bytes) for phase in phases],
        **{f"host, {kind}": [_gb(phase.host.get(kind, 0)) for phase in phases] for kind in HOST},
        **{f"host of rank 0, {kind}": [_gb(phase.host_main.get(kind, 0)) for phase in phases] for kind in HOST},
        "host memory of the node": [_gb(phase.node_bytes) for phase in phases],
        "traffic / step": [_gb(phase.traffic_bytes) for phase in phases],
        "traffic of dense DPO": [_gb(phase.dense_dpo_traffic_bytes) for phase in phases],
        "checkpoint": [_gb(phase.checkpoint_bytes) for phase in phases],
        "scratch on disk": [_gb(phase.scratch_bytes) for phase in phases],
        "windows, passes": [f"{phase.windows}, {phase.passes}" if phase.windows else "-" for phase in phases],
        "PFLOP / step": [f"{phase.flops / 1e15:.1f}" if phase.flops else "-" for phase in phases],
        "seconds / step": [f"{phase.step_s:.1f}" if phase.step_s else "-" for phase in phases],
        "time of the stage": [f"{phase.times} x {_time(phase.seconds)}" if phase.seconds else "-" for phase in phases],
    }


def _gb(count: float) -> str:
    return f"{count / 1e9:.{2 if count >= 1e7 else 5}f}" if count else "-"


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _place(phase: Phase) -> str:
    return phase.placement if phase.zero_stage is None else f"{phase.placement} Z{phase.zero_stage}"
