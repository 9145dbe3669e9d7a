"""`python -m tests.drills soak`: runs that are ended again and again, at any time, by any signal, until they are done.

    python -m tests.drills soak [--cycles N] [--seed S]

Each run ends with the bytes of an undisturbed one, and every command that was ended says so as it should.
"""

import argparse
import os
import random
import signal
import time
from collections import Counter

from tests.drills.injector import fault, library
from tests.drills.lab import Lab, contents, difference
from tests.drills.process import Done, Running, run
from tests.drills.run import CONFIG, RUN
from tests.drills.states import States

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OPERATIONS = 120  # a fault by the injector strikes at one of the first so many
LONGEST_S = 1.2  # until a signal
MORE_STEPS = ["warmup.num_train_epochs=2", "learn.num_train_epochs=3", "forget.num_train_epochs=2"]
JOBS = {  # state, settings
    "sampled, float32": ("fresh", []),
    "sampled, bfloat16": ("fresh", ["model.dtype=bfloat16", "model.rounding=stochastic"]),
    "preferences, float32": ("preferences", MORE_STEPS),
    "preferences, bfloat16": ("preferences", ["model.dtype=bfloat16", *MORE_STEPS]),
}


def end(lab: Lab, words: list[str], draw: random.Random) -> tuple[str, Done]:
    """The command, and what was done to it."""
    kind = draw.choice([*SIGNALS, "kill", "half"] if library() else SIGNALS)
    if isinstance(kind, str):
        at = draw.randint(1, OPERATIONS)
        return f"{kind} at {at}", run(words, lab.folder, fault(kind, at, lab.folder / RUN.parts[0]), timeout=300)
    process, after = Running(words, lab.folder), draw.uniform(0.02, LONGEST_S)
    time.sleep(after)
    os.kill(process.pid, kind)  # not waited for yet: the number is still its own
    return f"{kind.name} after {after:.2f} s", process.wait(300)


def is_ended(done: Done) -> bool:
    """By the signal, or by a command that says that it was; one that had not begun says nothing."""
    unbegun = done.code in (-number for number in SIGNALS) and not done.lines
    return done.code in (0, -signal.SIGKILL) or unbegun or (done.is_clear and done.code != 2)


def until_done(lab: Lab, words: list[str], draw: random.Random, left: int) -> tuple[Counter, str]:
    """At most `left` cycles; what was done, and what is wrong."""
    cycles: Counter = Counter()
    while cycles.total() < left:
        what, done = end(lab, words, draw)
        if done.code == 0:
            return cycles, ""
        if not is_ended(done):
            return cycles, f"{what}: {done.code}: {done.line}"
        cycles[what.split()[0]] += 1
    done = run(words, lab.folder, timeout=300)
    return cycles, "" if done.code == 0 else f"the last command: {done.line}"


def soak(options: argparse.Namespace) -> int:
    draw, states = random.Random(options.seed), States()
    cycles, runs, wrong, expected = Counter(), 0, 0, {}
    begun = time.perf_counter()
    try:
        while cycles.total() < options.cycles:
            name, seed = list(JOBS)[runs % len(JOBS)], runs // len(JOBS) % 3
            state, settings = JOBS[name]
            words = ["run", CONFIG, *settings, f"seeds=[{seed}]"]
            if (name, seed) not in expected:
                undisturbed = states.lab(state)
                done = run(words, undisturbed.folder, timeout=300)
                assert done.code == 0, done.err
                expected[name, seed] = contents(undisturbed.run)
                undisturbed.remove()
            lab = states.lab(state)
            added, said = until_done(lab, words, draw, options.cycles - cycles.total())
            said = said or difference(contents(lab.run), expected[name, seed])
            print(f"{name}, seed {seed}: {added.total()} cycles: {said or 'the same bytes'}", flush=True)
            cycles += added
            runs, wrong = runs + 1, wrong + bool(said)
            lab.remove()
    finally:
        states.close()
    seconds = time.perf_counter() - begun
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(cycles.items()))
    print(f"{cycles.total()} cycles ({kinds}) over {runs} runs: {runs - wrong} the same, {wrong} not; {seconds:.0f} s")
    return 1 if wrong else 0
