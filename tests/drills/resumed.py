"""Killed runs of which something rots, goes away or is changed; then the same command."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save

import allo_fast.durable as engine
from tests.drills.damage import Damage, constant, emptied, flipped, lines, replaced, truncated, zeros
from tests.drills.drill import drill, table
from tests.drills.lab import Lab, Verdict
from tests.drills.process import Done
from tests.drills.run import CONFIG, LEARN, RERUN, RUN, SAMPLE, STARTED, WARMUP, checkpoints, reference_of, stop_after

RESUMED = "A killed run, damaged; same command"


def newest(lab: Lab, unit: str = WARMUP) -> Path:
    return checkpoints(lab.run / unit)[-1]


def checkpoint(lab: Lab, how: Damage) -> Verdict:
    path = newest(lab)
    lab.damage(path, how(path.read_bytes()))
    return lab.resumes("warmup", CONFIG)


def every_checkpoint(lab: Lab, how: Damage) -> Verdict:
    for path in checkpoints(lab.run / WARMUP):
        lab.damage(path, how(path.read_bytes()))
    return lab.resumes("warmup", CONFIG)


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """A safetensors file with other tensors, and the header's words as they were: no checksum of them fits."""

    def rewrite(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        about = json.loads(data[8 : 8 + length]).get("__metadata__")
        tensors = load(data)
        change(tensors)
        return save(tensors, about)

    return rewrite


def nan_in_a_moment(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "exp_avg_sq" in name or "moment" in name or "exp_avg" in name)
    tensors[name].view(-1)[0] = float("nan")


def without_a_moment(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "exp_avg" in name or "moment" in name)]


table(
    RESUMED,
    "killed-warmup",
    checkpoint,
    {
        "checkpoint: flipped byte in a value": {f"at {place}": flipped(place) for place in (0.3, 0.5, 0.7, -2)},
        "checkpoint: header flipped or file truncated": {
            "length": flipped(0),
            "header": flipped(0.01),
            "truncated": truncated(),
            "huge header": lambda data: (1 << 62).to_bytes(8, "little") + data[8:],
        },
        "checkpoint: empty (power loss)": {"empty": emptied, "NULs": zeros},
        "checkpoint without one moment": with_tensors(without_a_moment),
        "NaN in a moment": with_tensors(nan_in_a_moment),
    },
)
table(RESUMED, "killed-warmup", every_checkpoint, {"every checkpoint damaged": {"a": flipped(0.5), "b": emptied}})


@drill(RESUMED, "checkpoint deleted", "killed-warmup")
def without_checkpoint(lab: Lab) -> Verdict:
    path = newest(lab)
    lab.damaged.add(path)
    path.unlink()
    return lab.resumes("warmup", CONFIG)


@drill(RESUMED, "checkpoint of another run, same shapes", "killed-warmup")
def foreign_checkpoint(lab: Lab) -> Verdict:
    """Of a run with another learning rate; it is a whole file, and of another unit."""
    settings = ["warmup", CONFIG, "name=other", "warmup.learning_rate=2e-4"]
    copied = lab.folder / "runs/other"
    for stage in ("sample", "pairs"):
        lab.allo(stage, *settings[1:])
    assert lab.allo(*settings, before=stop_after("warmup", 5, noun="step")).code == -9
    for ours, theirs in zip(checkpoints(lab.run / WARMUP), checkpoints(copied / WARMUP), strict=True):
        lab.damage(ours, theirs.read_bytes())
    shutil.rmtree(copied)
    return lab.resumes("warmup", CONFIG)


@drill(RESUMED, "checkpoint of another stage", "killed-warmup")
def stage_checkpoint(lab: Lab) -> Verdict:
    source = checkpoints(lab.state("killed-learn") / RUN / LEARN)[-1]
    lab.damage(newest(lab), source.read_bytes())
    return lab.resumes("warmup", CONFIG)


def file_of(lab: Lab, name: str, how: Damage, unit: str = WARMUP, command: str = "warmup") -> Verdict:
    path = lab.run / unit / name
    lab.damage(path, how(path.read_bytes()))
    return lab.resumes(command, CONFIG)


def reference(lab: Lab, how: Damage) -> Verdict:
    path = reference_of(lab.run)
    lab.damage(path, how(path.read_bytes()))
    return lab.resumes("warmup", CONFIG)


table(
    RESUMED,
    "killed-warmup",
    reference,
    {
        "reference_logps: flipped byte": {"value": flipped(0.9), "header": flipped(0.02)},
        "reference_logps: truncated or empty": {"truncated": truncated(), "empty": emptied},
    },
)


@drill(RESUMED, "reference_logps deleted", "killed-warmup")
def reference_gone(lab: Lab) -> Verdict:
    path = reference_of(lab.run)
    lab.damaged.add(path)
    path.unlink()
    return lab.resumes("warmup", CONFIG)


def but_for_the_log(lab: Lab, done: Done) -> str:
    """What differs, the log left out where its damage was said."""
    changed = lab.changed()
    only_log = changed == f"other bytes: {WARMUP}/metrics.jsonl"
    return "" if only_log and any("metrics.jsonl" in line for line in done.lines) else changed


def log(lab: Lab, how: Damage) -> Verdict:
    """What a log has lost may be missing in the end, if that is said; it never stands between a model and its end."""
    path = lab.run / WARMUP / "metrics.jsonl"
    lab.damage(path, how(path.read_bytes()))
    return lab.judged(lambda done: but_for_the_log(lab, done), "warmup", CONFIG)


table(
    RESUMED,
    "killed-warmup",
    log,
    {
        "metrics.jsonl: flipped or torn line": {
            "flipped": lines(lambda rows: [rows[0], b"\x01" + rows[1][1:], *rows[2:]]),
            "torn": lines(lambda rows: [rows[0], rows[1][:20] + b"\n", *rows[2:]]),
        },
        "metrics.jsonl: flipped key": replaced(b'"tokens"', b'"tokenz"'),
        "metrics.jsonl empty after the last checkpoint": emptied,
        "metrics.jsonl: last line torn after the last checkpoint": lambda data: data[:-20],
        "metrics.jsonl: NULs": zeros,
    },
)


@drill(RESUMED, "metrics.jsonl deleted", "killed-warmup")
def log_gone(lab: Lab) -> Verdict:
    path = lab.run / WARMUP / "metrics.jsonl"
    lab.damaged.add(path)
    path.unlink()
    return lab.judged(lambda done: but_for_the_log(lab, done), "warmup", CONFIG)


table(
    RESUMED,
    "killed-warmup",
    lambda lab, how: file_of(lab, STARTED, how),
    {
        f"{STARTED} truncated, empty, NULs": {"truncated": truncated(), "empty": emptied, "NULs": zeros},
        f"{STARTED} flipped": {f"at {place}": flipped(place) for place in (0.2, 0.5, 0.8)},
        f"{STARTED} = null, [], {{}}": {text: constant(text.encode()) for text in ("null", "[]", "{}")},
    },
)


def rows(lab: Lab, how: Damage) -> Verdict:
    path = lab.run / SAMPLE / "responses.jsonl"
    lab.damage(path, how(path.read_bytes()))
    return lab.resumes("sample", CONFIG)


def other_rows(data: bytes) -> bytes:
    """Of the same shape, as of a run with another seed."""
    return lines(lambda rows: [row.replace(b'"text": "', b'"text": "0') for row in rows])(data)


table(
    RESUMED,
    "killed-sample",
    rows,
    {
        "responses.jsonl.partial: torn line": lambda data: data[:-30],
        "partial: NULs at the end": lambda data: data + bytes(64),
        "partial: NULs and a newline": lambda data: data + bytes(64) + b"\n",
        "partial: broken line": lines(lambda rows: [rows[0], rows[1][:40] + b"\n", *rows[2:]]),
        "partial: invalid UTF-8": lines(lambda rows: [rows[0][:30] + b"\xff\xfe" + rows[0][30:], *rows[1:]]),
        "partial: flipped digit in an answer": lines(lambda rows: [*rows[:-1], rows[-1].translate(DIGITS)]),
        "partial: rows of another run": other_rows,
        "partial: a line twice": lines(lambda rows: [rows[0], *rows]),
        "partial: a line lost": lines(lambda rows: [*rows[:1], *rows[2:]]),
        "partial: three times too long": lambda data: data * 6,
        "partial: null lines": lines(lambda rows: [b"null\n" for _ in rows]),
        "partial: empty": emptied,
    },
)


@drill(RESUMED, "partial: its checksums gone or damaged", "killed-sample")
def sums(lab: Lab) -> Verdict:
    found = sorted((lab.run / SAMPLE).rglob("*.sums"))
    if not found:
        return Verdict("unclear", "rows have no checksums")
    lab.damage(found[0], flipped(0.5)(found[0].read_bytes()))
    return lab.resumes("sample", CONFIG)


@drill(RESUMED, "scratch of locating damaged", "killed-locate")
def scratch(lab: Lab) -> Verdict:
    for path in sorted((lab.run / "05-locate/seed-0").rglob("*.safetensors")):
        lab.damage(path, flipped(-8)(path.read_bytes()))
    return lab.resumes("locate", CONFIG)


@drill(RESUMED, "scratch of locating truncated", "killed-locate")
def short_scratch(lab: Lab) -> Verdict:
    for path in sorted((lab.run / "05-locate/seed-0").rglob("*.safetensors")):
        lab.damage(path, truncated()(path.read_bytes()))
    return lab.resumes("locate", CONFIG)


def other_settings(lab: Lab, setting: str) -> Verdict:
    before = lab.snapshot()
    done = lab.allo("warmup", CONFIG, setting)
    if done.code == 0:
        return Verdict("silent", "accepted")
    lost = lab.lost(before, done)
    key = setting.partition("=")[0]
    if not done.is_clear or key not in done.line:
        return Verdict("unclear", done.line, lost)
    verdict = lab.resumes("warmup", CONFIG)
    return Verdict("silent" if lost else verdict.grade, f"{done.line}; then {verdict.said}", lost or verdict.lost)


table(
    RESUMED,
    "killed-warmup",
    other_settings,
    {
        "changed setting on resume": {
            "rate": "warmup.learning_rate=2e-4",
            "beta": "warmup.beta=0.3",
            "another stage's": "sample.temperature=0.3",
        },
        "changed attention on resume": "model.attn_implementation=eager",
    },
)


@drill(RESUMED, "other torch on resume", "killed-warmup")
def versions(lab: Lab) -> Verdict:
    """It goes on, and says so."""

    def other_torch() -> None:
        ours = engine.version
        engine.version = lambda name: "1.0.0" if name == "torch" else ours(name)

    done = lab.allo("warmup", CONFIG, before=other_torch)
    said = [line for line in done.lines if "1.0.0" in line]
    if done.code:
        return Verdict("unclear", done.line)
    return Verdict("good" if len(said) == 1 else "silent", said[0] if said else "exit 0, no word")


@drill(RESUMED, "wall clock a year back", "killed-warmup")
def clock(lab: Lab) -> Verdict:
    def earlier() -> None:
        now = time.time
        time.time = lambda: now() - 3e7

    return lab.resumes("warmup", CONFIG, before=earlier)


@drill(RESUMED, "typo in data.train, then corrected", "fresh")
def typo(lab: Lab) -> Verdict:
    done = lab.allo("sample", CONFIG, "data.train=typo.jsonl")
    if done.code != 2 or not done.is_clear:
        return Verdict("unclear", done.line)
    then = lab.allo("sample", CONFIG)
    return Verdict("unclear" if then.code else "good", f"{done.line}; then {then.line}")


@drill(RESUMED, "failed `report --rerun` with another setting", "killed-warmup")
def failed_report(lab: Lab) -> Verdict:
    done = lab.allo("report", CONFIG, "forget.beta=0.9", RERUN)
    if done.code != 2 or not done.is_clear:
        return Verdict("unclear", done.line)
    return lab.resumes("warmup", CONFIG)


DIGITS = bytes.maketrans(b"0123456789", b"1234567890")
