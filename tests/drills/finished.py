"""Finished runs of which something rots, goes away or is changed; then the same command."""

import os
import shutil
from functools import partial

from tests.drills.damage import Damage, constant, emptied, flipped, truncated, with_value, zeros
from tests.drills.drill import drill, table
from tests.drills.lab import Lab, Verdict, copy_to
from tests.drills.run import (
    ASIDE,
    BASE_EVALUATED,
    CONFIG,
    FORGET,
    LEARN,
    LOCATE,
    MANIFEST,
    PAIRS,
    RERUN,
    REWARDS,
    SAMPLE,
    SAVED_CONFIG,
    WARMUP,
)

FINISHED = "A finished run, damaged; same command"


def damaged(lab: Lab, how: tuple[str, Damage]) -> Verdict:
    """how: a file of the run, and what happens to it."""
    path = lab.run / how[0]
    lab.damage(path, how[1](path.read_bytes()))
    return lab.resumes("run", CONFIG)


FLIPS = (
    f"{SAMPLE}/responses.jsonl",
    f"{SAMPLE}/problems.jsonl",
    f"{PAIRS}/pairs.jsonl",
    f"{WARMUP}/model/model.safetensors",
    f"{LOCATE}/learn.safetensors",
    f"{REWARDS}/rewards.jsonl",
    f"{FORGET}/delta.safetensors",
    f"{LEARN}/delta.safetensors",
    f"{BASE_EVALUATED}/predictions.jsonl",
)
for name in FLIPS:
    variants = {"flipped": (name, flipped(0.5)), "truncated": (name, truncated()), "empty": (name, emptied)}
    table(FINISHED, "finished", damaged, {name: variants})
table(FINISHED, "finished", damaged, {f"{SAMPLE}/quarantine.jsonl": (f"{SAMPLE}/quarantine.jsonl", constant(b"{}\n"))})


def copied(lab: Lab, how: tuple[str, Damage]) -> Verdict:
    """Damage to what nothing reads again: it is to be moved away, and all else is as it was."""
    path = lab.run / how[0]
    lab.damage(path, how[1](path.read_bytes()))
    lab.damaged |= {*path.parent.iterdir()}
    lab.expected = {name: held for name, held in lab.expected.items() if not name.startswith(f"{LEARN}/model/")}
    return lab.resumes("run", CONFIG, mend=lambda: path.parent.rename(lab.folder / "away"))


for name in (f"{LEARN}/model/model.safetensors", f"{LEARN}/model/tokenizer.json"):
    variants = {"flipped": (name, flipped(0.5)), "truncated": (name, truncated()), "empty": (name, emptied)}
    table(FINISHED, "finished", copied, {name: variants})


def needless(lab: Lab, how: tuple[str, Damage]) -> Verdict:
    """Damage to what no result depends on: nothing is made again, and nothing refused."""
    path = lab.run / how[0]
    lab.damage(path, how[1](path.read_bytes()))
    return lab.judged(lambda done: "", "run", CONFIG)


for name in (f"{WARMUP}/metrics.jsonl", f"{LEARN}/metrics.jsonl"):
    variants = {"flipped": (name, flipped(0.5)), "empty": (name, emptied), "truncated": (name, truncated())}
    table(FINISHED, "finished", needless, {name: variants})

manifest = f"{LEARN}/{MANIFEST}"
table(
    FINISHED,
    "finished",
    damaged,
    {
        f"{MANIFEST} empty or NULs": {"empty": (manifest, emptied), "NULs": (manifest, zeros)},
        f"{MANIFEST} truncated or flipped": {
            "truncated": (manifest, truncated()),
            **{f"flipped at {place}": (manifest, flipped(place)) for place in (0, 0.1, 0.3, 0.5, 0.7, 0.9, -1)},
        },
        f"{MANIFEST} = null, [], {{}}": {text: (manifest, constant(text.encode())) for text in ("null", "[]", "{}")},
    },
)
table(
    FINISHED,
    "finished",
    damaged,
    {
        f"a fact in {MANIFEST} altered": {
            "a count of steps": (manifest, with_value("facts", "steps", to=lambda _: 9999)),
            "right answers": (f"{BASE_EVALUATED}/{MANIFEST}", with_value("facts", "strict", to=lambda _: 7)),
            "its seed": (manifest, with_value("basis", "seed", to=lambda seed: seed + 1)),
        },
        f"{SAVED_CONFIG} of the run empty": (SAVED_CONFIG, emptied),
        f"{SAVED_CONFIG} of the run truncated": (SAVED_CONFIG, truncated(0.5)),
    },
)


@drill(FINISHED, "flipped bit, size and mtime kept", "finished")
def same_mtime(lab: Lab) -> Verdict:
    path = lab.run / LEARN / "delta.safetensors"
    stat = path.stat()
    lab.damage(path, flipped(0.7)(path.read_bytes()))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return lab.resumes("run", CONFIG)


@drill(FINISHED, "note added to a finished unit", "finished")
def note(lab: Lab) -> Verdict:
    path = lab.run / LEARN / "note.txt"
    path.write_text("the one for the paper")
    return lab.judged(lambda done: "" if path.exists() else "the note is gone", "run", CONFIG)


@drill(FINISHED, "seed-1 copied from seed-0", "finished")
def copied_seed(lab: Lab) -> Verdict:
    """What another seed left is not what this seed would have."""
    for unit in (SAMPLE, PAIRS, LEARN):
        copy_to(lab.run / unit, lab.run / unit.replace("seed-0", "seed-1"))
    done = lab.allo("run", CONFIG, "seeds=[1]", RERUN)
    files = [lab.run / SAMPLE.replace("seed-0", f"seed-{seed}") / "responses.jsonl" for seed in (0, 1)]
    if done.code:
        return Verdict("good" if done.is_clear else "unclear", done.line)
    same = files[0].read_bytes() == files[1].read_bytes()
    return Verdict("silent" if same else "good", "believed" if same else "made anew")


@drill(FINISHED, "README.md added to the base model's folder", "finished")
def readme(lab: Lab) -> Verdict:
    (lab.folder / "base/README.md").write_text("# the base\n")
    return lab.resumes("run", CONFIG)


def edited(lab: Lab, how: tuple[str, Damage]) -> Verdict:
    """An input is another: refused, nothing is lost, and with the old one the same command goes on."""
    path = lab.folder / how[0]
    before = path.read_bytes()
    path.write_bytes(how[1](before))
    return lab.judged(
        lambda done: lab.changed() if path.read_bytes() == before else "another input is accepted",
        "run",
        CONFIG,
        mend=lambda: path.write_bytes(before),
    )


def as_before(lab: Lab, how: tuple[str, Damage]) -> Verdict:
    """An input changed in what no result depends on, or is refused; with the old one the same command goes on."""
    path = lab.folder / how[0]
    before = path.read_bytes()
    path.write_bytes(how[1](before))
    return lab.resumes("run", CONFIG, mend=lambda: path.write_bytes(before))


table(
    FINISHED,
    "finished",
    edited,
    {
        "one row of data.train edited; no --rerun": ("train.jsonl", lambda data: data.replace(b"+", b"-", 1)),
        "one row of data.test edited": ("test.jsonl", lambda data: data.replace(b"+", b"-", 1)),
        "one weight of the base edited": ("base/model.safetensors", flipped(-3)),
    },
)
table(
    FINISHED,
    "finished",
    as_before,
    {"blank line appended to data.train": ("train.jsonl", lambda data: data + b"\n")},
)


@drill(FINISHED, "one row of data.train edited, then --rerun: what was there is kept", "finished")
def rerun(lab: Lab) -> Verdict:
    path = lab.folder / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"+", b"-", 1))
    before = lab.snapshot()
    done = lab.allo("run", CONFIG, RERUN)
    if done.code:
        return Verdict("unclear", done.line)
    lost = lab.lost(before, done)
    aside = [folder.name for folder in lab.run.glob(f"{ASIDE}*")]
    return Verdict("silent" if lost else "good", f"moved to {', '.join(aside)}" if aside else done.line, lost)


def away(lab: Lab, name: str, *words: str) -> Verdict:
    """An input that cannot be seen for one command."""
    path = lab.folder / name
    aside = path.with_name(f"{path.name}.away")
    path.rename(aside)
    words = words or ("run", CONFIG)
    return lab.resumes(*words, mend=lambda: aside.rename(path))


table(
    FINISHED,
    "finished",
    away,
    {
        "data.train away for one command": "train.jsonl",
        "data.test away for one command": "test.jsonl",
        "base model's folder away for one command": "base",
    },
)
table(
    FINISHED,
    "killed-sample",
    partial(away),
    {
        "base model away when a killed sampling is resumed": "base",
        "data.train away when a killed sampling is resumed": "train.jsonl",
    },
)
table(FINISHED, "killed-learn", away, {"base model away when a killed learning is resumed": "base"})


def deleted(lab: Lab, name: str) -> Verdict:
    path = lab.run / name
    lab.damaged |= {path, *path.rglob("*")}
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lab.resumes("run", CONFIG)


table(
    FINISHED,
    "finished",
    deleted,
    {
        f"{WARMUP}/model deleted for space": f"{WARMUP}/model",
        f"{FORGET}/delta.safetensors deleted": f"{FORGET}/delta.safetensors",
        f"{PAIRS} deleted": PAIRS,
        f"{LEARN}/{MANIFEST} deleted": f"{LEARN}/{MANIFEST}",
        f"{SAVED_CONFIG} of the run deleted": SAVED_CONFIG,
        "summary.json deleted": "summary.json",
    },
)


@drill(FINISHED, f"{LOCATE} deleted, then `learn`", "finished")
def located(lab: Lab) -> Verdict:
    shutil.rmtree(lab.run / LOCATE)
    return lab.resumes("learn", CONFIG, mend=lambda: lab.allo("locate", CONFIG))


@drill(FINISHED, f"{LEARN} a symlink, then damaged", "finished")
def linked(lab: Lab) -> Verdict:
    unit, elsewhere = lab.run / LEARN, lab.folder / "elsewhere"
    unit.rename(elsewhere)
    unit.symlink_to(elsewhere)
    lab.damage(unit / "delta.safetensors", truncated()((unit / "delta.safetensors").read_bytes()))
    return lab.resumes("run", CONFIG)
