"""What the stages took: time, memory, and their states beside those that were planned and those of dense DPO."""

from allo_fast.config import UserError
from allo_fast.plan.job import job_of, phases_of
from allo_fast.plan.phase import Phase
from allo_fast.report import figures
from allo_fast.report.markup import section, table, wide
from allo_fast.runs.run import Run

_HEAD = ("stage", "time", "peak MiB", "tokens / s", "weights trained", "they moved", "states", "planned", "dense DPO")

_PREFERENCES = ("warmup", "forget", "learn")  # stages that dense DPO stands beside


def section_of(run: Run, summary: dict) -> str:
    planned, rows = _planned(run), []
    for name, stage in summary["stages"].items():
        phase = planned.get(name.partition("/")[0].partition("-")[2])
        trains = phase and "state_bytes_per_parameter" in stage
        parameters = stage.get("parameters")
        rows.append(
            (
                name,
                f"{stage['seconds']:,.1f} s",
                f"{stage['peak_bytes'] / 2**20:,.0f}",
                _number(stage.get("tokens_per_second")),
                *_shares(stage),
                _states(stage),
                f"{phase.state_bytes / parameters:.2f}" if trains else "",
                f"{phase.dense_dpo_bytes / parameters:.2f}" if trains and phase.stage in _PREFERENCES else "",
            )
        )
    text = (
        "Peak memory is the whole process's, or the GPU's where one is used. States are bytes a weight of the model: "
        "weights, reference, gradients, moments and positions, counted from live tensors; planned: by allo-fast plan "
        "for one device; dense DPO: float32 masters beside a bfloat16 model and a reference copy."
    )
    return section("Time and memory", text, wide(figures.stage_times(summary["stages"])) + table(_HEAD, rows))


def _planned(run: Run) -> dict[str, Phase]:
    """By stage; nothing where the base's configuration is not there, or adapters train."""
    if run.config.warms_up and run.config.warmup.lora:
        return {}
    try:
        phases = phases_of(job_of(run.config, 1, 1e15), run.zeros)
    except UserError:
        return {}
    return {phase.stage: phase for phase in phases}


def _states(stage: dict) -> str:
    states = _number(stage.get("state_bytes_per_parameter"), 2)
    if locating := stage.get("locating"):  # of a stage that locates for itself
        states += f", locating {_number(locating['state_bytes_per_parameter'], 2)}"
    return states


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _shares(stage: dict) -> tuple[str, str]:
    if "selected" not in stage:
        return "100 %" if "steps" in stage and "windows" not in stage else "", ""
    return f"{stage['selected'] / stage['parameters']:.2%}", f"{stage['changed'] / stage['selected']:.1%}"
