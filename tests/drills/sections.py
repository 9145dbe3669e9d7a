"""Every drill, in the order of the table: importing these files fills the list."""

# ruff: noqa: F401, I001
from tests.drills import killed, flushed, rerun, finished, resumed, numbers, data, configuration, tools, size, ranks
from tests.drills.drill import DRILLS, Drill

# By title, those of the test suite: of every kind a few that take a second or two.
FAST = {
    "kill -9 in learn, same command",
    "loss of power: what is said to be there is flushed",
    "SIGTERM in warm-up",
    "SIGHUP in warm-up",
    "SIGHUP in warm-up, and the terminal is gone",
    "SIGINT in warm-up",
    "SIGINT twice",
    "in warm-up's checkpoint",
    "at MANIFEST.json of a finished stage",
    "flipped bit, size and mtime kept",
    "note added to a finished unit",
    "README.md added to the base model's folder",
    "one row of data.train edited; no --rerun",
    "data.train away for one command",
    "config.yaml of the run empty",
    "checkpoint: flipped byte in a value",
    "checkpoint: empty (power loss)",
    "checkpoint of another stage",
    "reference_logps: flipped byte",
    "STARTED.json flipped",
    "partial: flipped digit in an answer",
    "partial: a line twice",
    "typo in data.train, then corrected",
    "NaN weight: eval, preference",
    "NaN in an unused embedding row",
    "lr 1e38, warm-up's last step",
    "chosen = rejected but for trailing spaces",
    "duplicate JSON keys",
    "UTF-16 file",
    "one lone surrogate",
    "one deeply nested row",
    "one chat row, no template",
    "YAML alias bomb",
    "latin-1 or UTF-16 file",
    "5000 brackets",
    "duplicate YAML keys (1e-4, then 1e-3)",
    "!!python/object",
    "name ''",
    "name ../../x",
    "pytorch_model.bin, malicious",
    "auto_map code in the model",
    "flipped value in a delta, merge",
    "merge OUT = BASE",
    "two commands in one folder",
}


def fast() -> list[Drill]:
    return [drill for drill in every() if drill.title in FAST]


def every() -> list[Drill]:
    """Drills of one section together."""
    order = list(dict.fromkeys(drill.section for drill in DRILLS))
    return sorted(DRILLS, key=lambda drill: order.index(drill.section))
