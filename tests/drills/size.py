"""More rows and micro-batches than fit where rows are few."""

import json
import resource
import signal
import struct
from pathlib import Path

from tests.drills.drill import drill
from tests.drills.jobs import pair
from tests.drills.lab import Lab, Verdict
from tests.drills.run import CONFIG, reference_of, stop_after

SIZE = "Size"
ROWS = 1_000_000
ROOM = 1 << 29  # bytes of memory that reading, pairing and tokenizing them may take
MICRO_BATCHES = 1_600_000
LONGEST_HEADER = 100_000_000  # bytes that safetensors reads


@drill(SIZE, "1 million preference rows", "preferences", slow=True)
def million(lab: Lab) -> Verdict:
    with (lab.folder / "train.jsonl").open("w") as file:
        file.writelines(json.dumps(pair(number)) + "\n" for number in range(ROWS))
    before, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, []
    for stage in ("sample", "pairs"):
        done = lab.allo(stage, CONFIG, timeout=3600)
        said.append(f"{stage}: {(done.peak_bytes - before) / 2**30:.2f} GiB beside the imports")
        if done.code:
            return Verdict("unclear", f"{said[-1]}; {done.line}")
        if done.peak_bytes - before > ROOM:
            return Verdict("unclear", said[-1])
    return Verdict("good", "; ".join(said))


def header_bytes(path: Path) -> int:
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


@drill(SIZE, "1.6 million micro-batches of reference log-probabilities", "killed-warmup")
def many_micro_batches(lab: Lab) -> Verdict:
    """Extrapolated: the header of a cache of four times as many micro-batches."""
    few = header_bytes(reference_of(lab.run))
    settings = ["warmup.per_device_train_batch_size=1", "warmup.gradient_accumulation_steps=4", "name=many"]
    for stage, before in (("sample", None), ("pairs", None), ("warmup", stop_after("warmup", 2, noun="step"))):
        done = lab.allo(stage, CONFIG, *settings, before=before)
        if done.code not in (0, -signal.SIGKILL):
            return Verdict("unclear", done.line)
    each = (header_bytes(reference_of(lab.run.with_name("many"))) - few) / 18  # 36 micro-batches instead of 18
    needed = each * MICRO_BATCHES
    said = f"its header would have {needed / 1e6:.0f} MB, {LONGEST_HEADER / 1e6:.0f} are read"
    return Verdict("unclear" if needed > LONGEST_HEADER else "good", said)
