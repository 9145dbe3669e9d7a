"""Processes that end at the wrong time, and disks that fill."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from tests.drills.drill import drill, table
from tests.drills.injector import fault, library, reason
from tests.drills.lab import Lab, Verdict
from tests.drills.process import Done
from tests.drills.run import (
    CONFIG,
    LEARN,
    MANIFEST,
    PRETRAIN,
    SAMPLE,
    SAVED_CONFIG,
    UNITS,
    WARMUP,
    hang_up,
    kill_at_rename,
    stop_after,
    stop_in_report,
)

KILLED = "Killed and resumed"
FULL = "Disk full"


def killed_and_resumed(lab: Lab, stop) -> Verdict:
    done = lab.allo("run", CONFIG, before=stop)
    if done.code != -signal.SIGKILL:
        return Verdict("unclear", f"it was not killed: {done.line}")
    lab.units = UNITS
    return lab.resumes("run", CONFIG)


def resumed(lab: Lab, _: str) -> Verdict:
    """Of a state that was killed in a stage."""
    lab.units = UNITS
    return lab.resumes("run", CONFIG)


@drill(KILLED, "kill -9 in pretrain, same command", "pretrain")
def pretrain(lab: Lab) -> Verdict:
    assert lab.allo("pretrain", CONFIG, before=stop_after("pretrain", 3)).code == -signal.SIGKILL
    lab.expected, lab.units = {}, [PRETRAIN]
    done = lab.allo("pretrain", CONFIG)
    base = lab.folder.parent / "fresh/base/model.safetensors"
    model = lab.run / PRETRAIN / "model/model.safetensors"
    same = done.code == 0 and model.read_bytes() == base.read_bytes()
    return Verdict("good" if same else "silent", done.line if done.code else "the same bytes")


for stage in ("sample", "warmup", "locate", "forget", "learn", "evaluate"):
    title = f"kill -9 in {stage}, same command"
    table(KILLED, f"killed-{stage}", resumed, {title: stage})
table(KILLED, "killed-rewards", resumed, {"kill -9 in rewards (training), same command": "rewards"})
table(
    KILLED,
    "killed-rewards",
    killed_and_resumed,
    {"kill -9 in rewards (scoring), same command": stop_after("rewards", 8, noun="response")},
)
table(KILLED, "killed-sample", killed_and_resumed, {"kill -9 in pairs, same command": stop_after("pairs", 4)})
table(KILLED, "finished", killed_and_resumed, {"kill -9 in report, same command": stop_in_report})
table(
    KILLED,
    "killed-learn",
    killed_and_resumed,
    {f"kill -9 while {MANIFEST}.partial is there (learn)": kill_at_rename(MANIFEST)},
)


def injected(lab: Lab, kind: str, at: int, match: str, *words: str) -> Verdict | Done:
    """A command under a fault; a verdict where it is not to be had, or where it did not strike."""
    if library() is None:
        return Verdict("skipped", reason)
    done = lab.allo(*words, before=fault(kind, at, lab.folder, match))
    return Verdict("skipped", "there is no such operation") if done.code == 0 else done


def killed_at(lab: Lab, place: tuple[str, int, str], command: str = "run") -> Verdict:
    """place: kind, number of the operation, part of its path."""
    done = injected(lab, *place, command, CONFIG)
    if isinstance(done, Verdict):
        return done
    lab.units = UNITS if command == "run" else lab.units
    return lab.resumes(command, CONFIG)


@drill(KILLED, "kill -9 in a sampling run, again while the resumed one writes its rows", "killed-sample")
def killed_twice(lab: Lab) -> Verdict:
    rows = lab.run / SAMPLE / "responses.jsonl"
    before = rows.read_bytes()
    for kind in ("kill", "half"):
        done = injected(lab, kind, 2, rows.name, "sample", CONFIG)
        if isinstance(done, Verdict):
            return done
        left = rows.read_bytes() if rows.exists() else b""
        if not left.startswith(before):
            count = before.count(b"\n"), left.count(b"\n")
            return Verdict("silent", "a killed command took rows away", f"rows: {count[0]} -> {count[1]}")
    return lab.resumes("sample", CONFIG)


config_writes = {f"{kind} {at}": (kind, at, SAVED_CONFIG) for kind in ("kill", "half") for at in (1, 2, 3)}
table(KILLED, "fresh", killed_at, {f"kill -9 while {SAVED_CONFIG} is written": config_writes})
table(
    KILLED,
    "killed-warmup",
    partial(killed_at, command="warmup"),
    {
        "kill -9 inside a checkpoint or model save": {
            **{f"{kind} {at}": (kind, at, WARMUP) for kind in ("half", "kill") for at in (3, 4, 5, 6, 8, 12, 14, 16)},
        }
    },
)


def ended_by(lab: Lab, signals: tuple[int, ...]) -> Verdict:
    """In training, far from a checkpoint: the step's end is saved, and the signal's code returned; a second one ends
    the command at once."""
    shutil.rmtree(lab.run / WARMUP)
    log = lab.run / WARMUP / "metrics.jsonl"
    done = lab.allo("warmup", CONFIG, before=stop_after("warmup", 5, *signals, noun="step"))
    said = done.complaints if len(signals) == 1 else [line for line in done.lines if "ends it at once" in line]
    if done.code != (128 + signals[0] if len(signals) == 1 else -signals[0]) or done.has_traceback or len(said) != 1:
        return Verdict("unclear", f"{done.code}: {done.line}")
    steps = log.read_text().splitlines()
    verdict = lab.resumes("warmup", CONFIG)
    lost = [step for step in steps if step not in log.read_text().splitlines()]
    if verdict.grade == "good" and lost and len(signals) == 1:
        return Verdict("unclear", done.line, f"{len(lost)} steps")
    return Verdict(verdict.grade, f"{done.line}; then {verdict.said}", verdict.lost)


for names in ("TERM", "HUP", "INT", "INT twice", "INT four times"):
    name, count = names.split()[0], 2 if "twice" in names else 4 if "four" in names else 1
    row = {f"SIG{name} in warm-up" if count == 1 else f"SIG{names}": (signal.Signals[f"SIG{name}"],) * count}
    table(KILLED, "killed-warmup", ended_by, row)


@drill(KILLED, "SIGHUP in warm-up, and the terminal is gone", "killed-warmup")
def terminal_closed(lab: Lab) -> Verdict:
    """Nothing can be said any more; the step's checkpoint is there, and the code is the signal's."""
    shutil.rmtree(lab.run / WARMUP)
    done = lab.allo("warmup", CONFIG, before=stop_after("warmup", 5, signal.SIGHUP, noun="step", first=hang_up))
    saved = (lab.run / WARMUP / "checkpoint-6.safetensors").exists()
    verdict = lab.resumes("warmup", CONFIG)
    as_it_should = done.code == 129 and saved
    return verdict if as_it_should else Verdict("unclear", f"{done.line}; checkpoint of the next step: {saved}")


@drill(KILLED, "SIGINT while importing", "fresh")
def interrupted_import(lab: Lab) -> Verdict:
    command = [sys.executable, "-m", "allo_fast", "run", CONFIG]
    source = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{source}:{source / 'kernels'}"}
    with subprocess.Popen(
        command, cwd=lab.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        time.sleep(1)
        started.send_signal(signal.SIGINT)
        out, err = started.communicate()
    done = Done(started.returncode, out, err)
    clear = done.code in (130, -signal.SIGINT) and not done.has_traceback and len(done.lines) <= 1
    return Verdict("good" if clear else "unclear", done.line)


def full(lab: Lab, place: tuple[str, str]) -> Verdict:
    """place: command, part of a path from whose first operation on there is no space."""
    command, match = place
    done = injected(lab, "full", 1, match, command, CONFIG)
    if isinstance(done, Verdict):
        return done
    if not done.is_clear:
        verdict = lab.resumes(command, CONFIG)
        return Verdict(verdict.grade if verdict.grade == "silent" else "unclear", done.line, verdict.lost)
    verdict = lab.resumes(command, CONFIG)
    return Verdict(verdict.grade, f"{done.line}; with space {verdict.said}", verdict.lost)


for title, state, command, match in (
    ("in warm-up's checkpoint", "killed-warmup", "warmup", "checkpoint"),
    ("in learn's checkpoint", "killed-learn", "learn", "checkpoint"),
    ("in learn's model save", "killed-learn", "learn", "model"),
    ("in a delta", "killed-forget", "forget", "delta"),
    ("while sampling", "killed-sample", "sample", "responses.jsonl"),
    ("in the scratch of locating", "killed-locate", "locate", "scratch"),
    ("at resume, training", "killed-warmup", "warmup", ""),
    ("at resume, sampling", "killed-sample", "sample", ""),
    ("at the summary", "finished", "run", "summary"),
    (f"at {MANIFEST} of a finished stage", "killed-learn", "learn", MANIFEST),
):
    table(FULL, state, full, {title: (command, match)})


@drill(FULL, "merge without space for OUT", "finished")
def merge(lab: Lab) -> Verdict:
    words = ("merge", "base", f"{lab.run / LEARN}/delta.safetensors", "out")
    done = injected(lab, "full", 1, "model.safetensors", *words)
    if isinstance(done, Verdict):
        return done
    left = (lab.folder / "out").exists()
    again = lab.allo(*words)
    good = done.is_clear and not left and again.code == 0
    return Verdict("good" if good else "unclear", f"{done.line}; then {again.line}")
