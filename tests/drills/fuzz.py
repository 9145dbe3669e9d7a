"""`python -m tests.drills fuzz`: files that a command reads, changed at random; each is refused or used rightly.

    python -m tests.drills fuzz [--inputs N] [--seed S] [--only-input K]

Of a user's files another content is another input: what counts is that no command crashes. Of a run's own files a
wrong result counts too, and anything finished that is lost. Input K of a seed is always the same.
"""

import argparse
import csv
import gzip
import io
import json
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.drills.lab import Lab, Verdict
from tests.drills.run import CONFIG, FORGET, LEARN, REWARDS, RUN
from tests.drills.states import KILLED, States

# What no result depends on: it may stay as it was damaged.
LOGS = ("metrics.jsonl", "reference-00000.safetensors")
COPIES = ("rewrites.jsonl", "locating.json", "selection.safetensors")  # which may be removed
KILLED_STATES = {f"killed-{stage}": unit for stage, (unit, _) in KILLED.items()}
VALUES = (None, True, -1, 0, 1 << 70, 1e400, float("nan"), "", "x" * 5000, "\ud800", [], {}, [[]], {"a": {}}, "../../x")


# ---- what is done to bytes


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 8))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def zero(data: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(data) + 1)
    end = min(len(data), begin + draw.choice((1, 16, 512, len(data))))
    return data[:begin] + bytes(end - begin) + data[end:]


def grow(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice((bytes(64), b"\n", b"\xff\xfe", data, b"{}\n", b"null\n"))


def lines(data: bytes, draw: random.Random) -> bytes:
    """One twice, one lost, or two swapped."""
    rows = data.splitlines(keepends=True)
    if not rows:
        return b"\n"
    one, other = draw.randrange(len(rows)), draw.randrange(len(rows))
    kind = draw.randrange(3)
    if kind == 0:
        rows.insert(one, rows[other])
    elif kind == 1:
        del rows[one]
    else:
        rows[one], rows[other] = rows[other], rows[one]
    return b"".join(rows)


def value(data: bytes, draw: random.Random) -> bytes:
    """Of a JSON document, or of a line of JSON lines, one value of another type, or a key lost."""
    try:
        return json.dumps(_other_value(json.loads(data), draw), indent=1).encode()
    except ValueError:
        rows = data.splitlines()
    if not rows:
        return b"null"
    at = draw.randrange(len(rows))
    try:
        rows[at] = json.dumps(_other_value(json.loads(rows[at]), draw)).encode()
    except ValueError:
        rows[at] = draw.choice((b"null", b"[]", b"7", b"{"))
    return b"\n".join(rows) + b"\n"


def _other_value(content: object, draw: random.Random) -> object:
    if isinstance(content, dict | list) and content and draw.random() < 0.9:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = draw.choice(keys)
        if draw.random() < 0.15:
            del content[key]
        else:
            content[key] = _other_value(content[key], draw)
        return content
    return draw.choice(VALUES)


def header(data: bytes, draw: random.Random) -> bytes:
    """Of a safetensors file: offsets that overlap, wrong dtypes and shapes, a huge length, a tensor lost."""
    if len(data) < 8:
        return data
    length = struct.unpack("<Q", data[:8])[0]
    if draw.random() < 0.2 or length > len(data):
        return struct.pack("<Q", draw.choice((0, 1 << 62, length * 2, length - 1, 100_000_001))) + data[8:]
    content = json.loads(data[8 : 8 + length])
    name = draw.choice([name for name in content if name != "__metadata__"] or ["__metadata__"])
    entry = content[name]
    kind = draw.choice(("offsets", "dtype", "shape", "lost", "renamed", "metadata", "value"))
    if kind == "offsets" and "data_offsets" in entry:
        entry["data_offsets"] = [draw.choice((0, 4, 1 << 40, -8)), entry["data_offsets"][1]]
    elif kind == "dtype":
        entry["dtype"] = draw.choice(("F64", "I8", "BF16", "BOOL", "X9", None))
    elif kind == "shape" and entry.get("shape"):
        entry["shape"] = draw.choice(([0], [1 << 40, 1 << 40], entry["shape"][::-1], [*entry["shape"], 1], [-1], "x"))
    elif kind == "lost":
        del content[name]
    elif kind == "renamed":
        content[f"{name}.other"] = content.pop(name)
    elif kind == "metadata":
        content.pop("__metadata__", None)
    else:
        content["__metadata__"] = _other_value(content.get("__metadata__"), draw)
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


ANY = (truncate, flip, zero, grow)
TEXTS = (*ANY, lines, value)


# ---- what is changed, and what is run then


@dataclass(frozen=True)
class Target:
    """The files that match `pattern` in a copy of `state`, and the command that reads them. own: of the run's files."""

    state: str
    pattern: str
    words: tuple[str, ...]
    own: bool = False
    prepare: Callable[[Lab], object] = lambda lab: None


def as_csv(lab: Lab) -> None:
    rows = [json.loads(line) for line in (lab.folder / "train.jsonl").read_text().splitlines()]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    (lab.folder / "train.csv").write_text(text.getvalue())


def as_json(lab: Lab) -> None:
    rows = [json.loads(line) for line in (lab.folder / "train.jsonl").read_text().splitlines()]
    (lab.folder / "train.json").write_text(json.dumps(rows, indent=1))


def as_gzip(lab: Lab) -> None:
    (lab.folder / "train.jsonl.gz").write_bytes(gzip.compress((lab.folder / "train.jsonl").read_bytes()))


def as_parquet(lab: Lab) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [json.loads(line) for line in (lab.folder / "train.jsonl").read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), lab.folder / "train.parquet")


def rewards(lab: Lab) -> None:
    (lab.folder / "rewards.jsonl").write_bytes((lab.run / REWARDS / "rewards.jsonl").read_bytes())


def delta(lab: Lab) -> None:
    (lab.folder / "delta.safetensors").write_bytes((lab.run / LEARN / "delta.safetensors").read_bytes())


def zero_json(lab: Lab) -> None:
    content = {
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "bf16": {"enabled": False},
        "steps_per_print": 5,
    }
    (lab.folder / "zero.json").write_text(json.dumps(content))


def gguf(lab: Lab) -> None:
    """A header with a few entries; no model."""
    key, text = b"general.architecture", b"llama"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(text)) + text
    (lab.folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)


CHECK, RUN_IT, SAMPLE_IT = ("check", CONFIG), ("run", CONFIG), ("sample", CONFIG)
TARGETS = [
    Target("fresh", CONFIG, CHECK),
    *(Target("fresh", f"base/{name}", SAMPLE_IT) for name in ("*.json", "*.json", "model.safetensors")),
    Target("fresh", "t*.jsonl", CHECK),
    Target("preferences", "train.jsonl", SAMPLE_IT),
    Target("chat", "base/tokenizer*.json", CHECK),
    *(
        Target("preferences", f"train.{kind}", (*SAMPLE_IT, f"data.train=train.{kind}"), prepare=prepare)
        for kind, prepare in (("csv", as_csv), ("json", as_json), ("jsonl.gz", as_gzip), ("parquet", as_parquet))
    ),
    Target("finished", "rewards.jsonl", (*CHECK, "rewards.source=file", "rewards.path=rewards.jsonl"), prepare=rewards),
    Target("finished", "delta.safetensors", ("merge", "base", "delta.safetensors", "out"), prepare=delta),
    Target("fresh", "zero.json", (*CHECK, "deepspeed=zero.json"), prepare=zero_json),
    Target("fresh", "model.gguf", ("convert", "model.gguf", "out"), prepare=gguf),
    *[Target("finished", f"{RUN}/**/*", RUN_IT, own=True)] * 6,
    *[Target("finished", f"{RUN}/{FORGET}/delta.safetensors", ("learn", CONFIG), own=True)],
    *(
        Target(f"killed-{stage}", f"{RUN}/{KILLED[stage][0]}/**/*", (stage, CONFIG), own=True)
        for stage in KILLED
        for _ in range(2)
    ),
    Target("killed-learn", f"{RUN}/**/*", ("learn", CONFIG), own=True),
]


def change(path: Path, among: list[Path], draw: random.Random) -> str:
    """Something happens to a file; says what."""
    if draw.random() < 0.06:
        path.unlink()
        return "deleted"
    if draw.random() < 0.06 and len(among) > 1:
        other = draw.choice([file for file in among if file != path])
        ours, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs), other.write_bytes(ours)
        return f"swapped with {other.name}"
    kinds = TEXTS if path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".partial") else ANY
    if path.suffix == ".safetensors":
        kinds = (*ANY, header, header)
    work = draw.choice(kinds)
    path.write_bytes(work(path.read_bytes(), draw))
    return work.__name__


def judge(lab: Lab, target: Target, path: Path, touched: list[Path]) -> Verdict:
    lab.damaged |= {path, *touched}
    if not target.own:
        done = lab.allo(*target.words, timeout=120)
        fine = done.code in (0, 2) and not done.has_traceback
        return Verdict("good" if fine else "unclear", done.line)

    def wrong(_) -> str:
        changed = lab.changed()
        name = str(path.relative_to(lab.run))
        unread = target.state in KILLED_STATES and not name.startswith(KILLED_STATES[target.state])
        hurt = {str(each.relative_to(lab.run)).removesuffix(".sums") for each in (path, *touched)}
        logs = {each for each in hurt if Path(each).name in LOGS} | ({name} if unread else set())
        copies = {each for each in hurt if Path(each).name in COPIES}
        allowed = {f"other bytes: {each}" for each in logs} | {f"missing: {each}" for each in logs | copies}
        return "" if changed in allowed else changed

    return lab.judged(wrong, *target.words, refusal=True, timeout=120)


def fuzzed(states: States, seed: int, number: int) -> tuple[str, Verdict]:
    draw = random.Random(f"{seed} {number}")
    target = draw.choice(TARGETS)
    lab = states.lab(target.state)
    target.prepare(lab)
    among = sorted(path for path in lab.folder.glob(target.pattern) if path.is_file())
    path = draw.choice(among)
    bytes_before = {file: file.read_bytes() for file in among}
    what = change(path, among, draw)
    touched = [file for file in among if not file.exists() or file.read_bytes() != bytes_before[file]]
    verdict = judge(lab, target, path, touched)
    name = path.relative_to(lab.folder)
    lab.remove()
    return f"{target.state}, {name} {what}, {target.words[0]}", verdict


def fuzz(options: argparse.Namespace) -> int:
    states, counts = States(), Counter()
    begun = time.perf_counter()
    numbers = [options.only_input] if options.only_input is not None else range(options.inputs)
    try:
        for number in numbers:
            what, verdict = fuzzed(states, options.seed, number)
            counts[verdict.grade] += 1
            if verdict.grade != "good" or options.only_input is not None:
                lost = f"; lost {verdict.lost}" * bool(verdict.lost)
                print(
                    f"seed {options.seed}, input {number}: {what}: {verdict.grade}: {verdict.said[:300]}{lost}",
                    flush=True,
                )
    finally:
        states.close()
    seconds = time.perf_counter() - begun
    print(f"{counts.total()} inputs: {', '.join(f'{counts[name]} {name}' for name in sorted(counts))}; {seconds:.0f} s")
    return 1 if counts["unclear"] + counts["silent"] else 0
