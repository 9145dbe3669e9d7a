"""Whatever `allo-fast plan` advises is enough, by its own count; the whole job stands in one line."""

import json
import re
from pathlib import Path

import pytest

from allo_fast.__main__ import main
from allo_fast.plan.costs import USABLE

CONFIGS = Path(__file__).parents[1] / "configs"
EIGHT = ["plan", str(CONFIGS / "llama3_8b.yaml"), "--model-config", str(CONFIGS / "models" / "llama3_8b.json")]


def planned(capsys, *words) -> dict:
    main([*EIGHT, *words, "--json"])
    return json.loads(capsys.readouterr().out)


def followed(words: list[str], advice: str) -> list[str]:
    """The command line with a piece of advice."""
    changes = re.findall(r"\S+=\S+", advice.replace(",", ""))
    words = [*words, *(change.replace("configs/", f"{CONFIGS}/") for change in changes)]
    for flag, pattern in (("--gpus", r"(\d+) devices"), ("--gpu-memory", r"with (\d+) GB(?! of host)")):
        if found := re.search(pattern, advice):
            words += [flag, found[1]]
    if found := re.search(r"nodes with (\d+) GB of host", advice):
        words += ["--host-memory", found[1]]
    return words


@pytest.mark.parametrize(
    "words",
    [
        ["--gpus", "1", "--gpu-memory", "24", "deepspeed=null"],
        ["--gpus", "1", "--gpu-memory", "16", "deepspeed=null", "rewards.ratio=1", "rivals=[dpo]"],
        ["--gpus", "2", "--gpu-memory", "40", f"deepspeed={CONFIGS}/zero1.json", "model.gradient_checkpointing=false"],
        ["--gpus", "8", "--gpu-memory", "20"],
        ["--gpus", "1", "--gpu-memory", "40", "deepspeed=null", "locate.windows=2"],
        ["--gpus", "8", "--gpu-memory", "80", "--host-memory", "64", "rivals=[dpo]"],
        ["--gpus", "1", "--gpu-memory", "40", "--host-memory", "60", "deepspeed=null", "locate.accumulators=host"],
        ["--gpus", "1", "--gpu-memory", "40", "deepspeed=null", "data.max_response_tokens=8000"],
    ],
    ids=["one", "dense", "unrecomputed", "auto", "windows", "host", "sums-in-host", "long"],
)
def test_advice_is_enough(words, capsys):
    plan = planned(capsys, *words)
    assert not plan["fits"] and plan["advice"]
    for line in plan["advice"]:
        stage, _, advice = line.partition(": ")
        again = planned(capsys, *followed(words, advice.partition("; ")[2]))
        (phase,) = [phase for phase in again["phases"] if phase["stage"] == stage]
        assert phase["device_bytes"] <= USABLE * again["gpu_bytes"], line
        assert not again["host_bytes"] or phase["node_bytes"] <= USABLE * again["host_bytes"], line


def test_every_stage_that_lacks_room_is_advised(capsys):
    plan = planned(capsys, "--gpus", "1", "--gpu-memory", "24", "deepspeed=null")
    lacking = [phase["stage"] for phase in plan["phases"] if phase["device_bytes"] > USABLE * 24e9]
    assert lacking == [line.partition(":")[0] for line in plan["advice"]]


def test_the_whole_job_in_one_line(capsys):
    assert main([*EIGHT, "--gpus", "1", "--gpu-memory", "40", "--device", "a100", "deepspeed=null"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the whole job")]
    assert re.search(r"fits: 3\d\.\d of 36\.8 GB a device \(locate\); locate in \d windows, \d+ passes", line)
    assert re.search(r"; at most \d+\.\d h; host memory \d+ GB a node; disk \d+ GB and \d+ of scratch", line)
    assert main([*EIGHT, "--gpu-memory", "20", "--host-memory", "100", "deepspeed=null"]) == 2
    said = capsys.readouterr().out
    assert "the whole job does not fit: " in said and "of 92 GB a node" in said


def test_host_memory_is_judged_where_it_is_known(capsys):
    """Eight processes load the model at once; ZeRO-3's rank 0 alone does. Offloaded states are every process's."""
    resident = planned(capsys, "--gpus", "8", "--gpu-memory", "80")
    assert resident["fits"] and resident["node_bytes"] == 8 * 2 * resident["parameters"]
    assert not planned(capsys, "--gpus", "8", "--gpu-memory", "80", "--host-memory", "128")["fits"]
    offload = f"deepspeed={CONFIGS}/zero3_offload.json"
    dense = planned(capsys, "--gpus", "8", "--gpu-memory", "80", offload, "rivals=[dpo]")
    (warmup,) = [phase for phase in dense["phases"] if phase["stage"] == "warmup"]
    saving = 12 * dense["parameters"]
    assert warmup["node_bytes"] == 8 * warmup["host"]["offloaded"] + saving > 16 * dense["parameters"]


@pytest.mark.parametrize("flag, value", [("--host-memory", "0"), ("--gpu-memory", "nan"), ("--gpus", "0")])
def test_machines_that_cannot_be(flag, value, capsys):
    assert main([*EIGHT, flag, value]) == 2
    assert flag in capsys.readouterr().err
