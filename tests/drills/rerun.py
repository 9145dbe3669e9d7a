"""A --rerun over a finished run that is killed at each of its operations on files."""

import json
import shutil

from tests.drills.drill import table
from tests.drills.injector import fault, library, operations, reason
from tests.drills.lab import Lab, Verdict, contents, copy_to, difference
from tests.drills.run import CONFIG, PAIRS, RERUN, RUN

BAD = "bad.jsonl"  # rewards that are refused when they are read
WORDS = {
    "pairs of other settings": ("pairs", CONFIG, "pairs.max_pairs=1"),
    "rewards that are refused, and taken away again": ("rewards", CONFIG, "rewards.source=file", f"rewards.path={BAD}"),
}


def killed(lab: Lab, words: tuple[str, ...]) -> Verdict:
    """Nothing that was finished is lost; then the same --rerun makes what it would have, and the command of before the
    bytes of before, where the unit is whole once more."""
    if library() is None:
        return Verdict("skipped", reason)
    (lab.folder / BAD).write_text(json.dumps({"prompt": "p", "response": "r", "rewards": [0.5]}))
    log = lab.folder / "operations"
    undisturbed = lab.allo(*words, RERUN, before=fault("count", 0, lab.run, log=log))
    made, found = contents(lab.run / PAIRS), operations(log)
    for operation in found:
        for then in (words, ("run", CONFIG)):
            shutil.rmtree(lab.run)
            copy_to(lab.state("finished") / RUN, lab.run)
            before = lab.snapshot()
            lab.allo(*words, RERUN, before=fault("kill", operation.number, lab.run))
            again = lab.allo(*then, RERUN)
            said = f"killed at {operation.number} ({operation.name} {operation.path}): {again.line}"
            if lost := lab.lost(before, again):
                return Verdict("silent", said, lost)
            if again.code != (undisturbed.code if then == words else 0):
                return Verdict("unclear", said)
            wrong = difference(contents(lab.run / PAIRS), made) if then == words else lab.changed()
            if wrong:
                return Verdict("silent", f"{said}; {wrong}")
    return Verdict("good", f"{len(found)} operations, {undisturbed.line}")


ROWS = {f"--rerun, killed: {title}": words for title, words in WORDS.items()}
table("Killed and resumed", "finished", killed, ROWS, slow=True)
