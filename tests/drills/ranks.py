"""Several processes of one run: a rank or the launcher ends, another command comes; and DeepSpeed JSON that is none."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.drills.drill import DRILLS, Drill, drill, table
from tests.drills.lab import Lab, Verdict, contents
from tests.drills.process import Running
from tests.drills.run import CONFIG, WARMUP, stop_after
from tests.drills.sweep import run_ranks

RANKS = "Ranks"
SOURCE = Path(__file__).parents[2]
WORLD = 2
END_S = 30  # in which all must have ended
SETTINGS = [
    "learn.gradient_accumulation_steps=2",
    "warmup.num_train_epochs=12",
    "warmup.save_steps=5",
    "deepspeed=zero.json",
]


class Launched:
    """A command under torchrun."""

    def __init__(self, lab: Lab):
        self.folder, self.log = lab.folder, lab.folder / "launcher.log"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={WORLD}", "-m", "allo_fast"]
        path = os.pathsep.join(map(str, (SOURCE, SOURCE / "kernels")))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "warmup", CONFIG, *SETTINGS],
                cwd=lab.folder,
                env=os.environ | {"PYTHONPATH": path},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ranks(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def said(self) -> str:
        return next((line for line in self.log.read_text().splitlines() if "allo-fast: " in line), "nothing")

    def until(self, condition: Callable[[], bool], seconds: float = 300) -> bool:
        """Whether it came to be."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        return condition()

    def close(self) -> None:
        """Ends what is left of it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def steps(lab: Lab) -> int:
    log = lab.run / WARMUP / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def disturbed(lab: Lab, how: tuple[int, Callable[[Launched], bool]]) -> Verdict:
    """how: the stage of ZeRO, and what happens in the middle of the warm-up; it says whether all ranks should end."""
    stage, strike = how
    (lab.folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    words = ["warmup", CONFIG, *SETTINGS]
    for earlier in ("sample", "pairs"):
        if (done := lab.allo(earlier, CONFIG, *SETTINGS)).code:
            return Verdict("unclear", done.line)
    launched = Launched(lab)
    try:
        begins = launched.until(lambda: steps(lab) >= 7 or launched.process.poll() is not None)
        if not begins or launched.process.poll() is not None:
            return Verdict("unclear", f"it ended before it was struck: {launched.said()}")
        ranks, begun = launched.ranks(), time.monotonic()
        if strike(launched):
            if not launched.until(lambda: not any(map(alive, ranks)), END_S):
                return Verdict("unclear", f"after {END_S} s ranks still run")
            said = f"all ended in {time.monotonic() - begun:.0f} s"
        else:
            launched.process.wait(300)
            said = "it went on to its end"
    finally:
        launched.close()
    done = run_ranks(lab, words, WORLD)
    if done.code:
        return Verdict("unclear", f"{said}; then {done.line}")
    found = contents(lab.run / WARMUP)
    expected = undisturbed(lab, words)
    same = all(found.get(name) == key for name, key in expected.items() if name.endswith(".safetensors"))
    return Verdict("good" if same else "silent", f"{said}; then {'the same weights' if same else 'other weights'}")


def undisturbed(lab: Lab, words: list[str]) -> dict[str, str]:
    (lab.run / WARMUP).rename(lab.folder / "disturbed")
    done = run_ranks(lab, words, WORLD)
    assert done.code == 0, done.err
    return contents(lab.run / WARMUP)


def kill_rank(number: int) -> Callable[[Launched], bool]:
    def strike(launched: Launched) -> bool:
        os.kill(launched.ranks()[number], signal.SIGKILL)
        return True

    return strike


def signal_launcher(number: int) -> Callable[[Launched], bool]:
    def strike(launched: Launched) -> bool:
        launched.process.send_signal(number)
        return True

    return strike


def pause(launched: Launched) -> bool:
    """A rank stands still for a while."""
    pid = launched.ranks()[1]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(pid, signal.SIGCONT)
    return False


def kill_launcher(launched: Launched) -> bool:
    """Where its ranks work on another command is refused; where they ended with it, that goes on."""
    launched.process.kill()
    time.sleep(1)
    done = subprocess.run(
        [sys.executable, "-m", "allo_fast", "warmup", CONFIG, *SETTINGS],
        cwd=launched.folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (SOURCE, SOURCE / "kernels")))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 or "works there" in done.stderr, f"{done.returncode}: {done.stderr[-300:]}"
    for pid in launched.ranks():
        os.kill(pid, signal.SIGKILL)
    return True


def on_ranks(rows: dict[str, tuple]) -> None:
    for title, how in rows.items():
        DRILLS.append(Drill(RANKS, title, "fresh", {"": lambda lab, how=how: disturbed(lab, how)}, ranks=True))


on_ranks(
    {
        "kill -9 rank 1 of 2 (ZeRO-3)": (3, kill_rank(1)),
        "kill -9 rank 0 (ZeRO-2)": (2, kill_rank(0)),
        "launcher killed, same command": (2, kill_launcher),
        "SIGTERM to the launcher": (2, signal_launcher(signal.SIGTERM)),
        "SIGSTOP for 5 s": (2, pause),
    }
)


@drill(RANKS, "two commands in one folder", "killed-learn")
def two_commands(lab: Lab) -> Verdict:
    """The second is refused, and the first goes on undisturbed."""
    first = Running(["learn", CONFIG], lab.folder, before=stop_after("learn", 8, signal.SIGSTOP, noun="step"))
    deadline = time.monotonic() + 30
    while "T" not in Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2] and time.monotonic() < deadline:
        time.sleep(0.01)
    second = lab.allo("learn", CONFIG)
    os.kill(first.pid, signal.SIGCONT)
    done = first.wait()
    if done.code:
        return Verdict("unclear", f"the first: {done.line}")
    if lab.changed():
        return Verdict("silent", lab.changed())
    return Verdict("good" if second.is_clear else "silent", second.line)


NONSENSE = (
    *('{"zero_optimization": {"stage": 7}}', '{"zero_optimization": {"stage": "two"}}', '{"zero_optimization": 2}'),
    *('{"zero_optimization": {"stages": 2}}', '{"zero_optimisation": {"stage": 2}}', "[]", "null", "7", '"auto"', ""),
    *("{", '{"zero_optimization": {"stage": 2,}}', '{"zero_optimization": {"stage": NaN}}', "\0\0\0", "\xff\xfe"),
    *('{"fp16": {"enabled": true}}', '{"bf16": {"enabled": "yes"}}', '{"bf16": 7}', '{"train_batch_size": 7}'),
    *('{"train_micro_batch_size_per_gpu": "many"}', '{"gradient_accumulation_steps": 3}', '{"gradient_clipping": "x"}'),
    *('{"optimizer": {"type": "SGD"}}', '{"scheduler": {"type": "WarmupLR"}}', '{"zero_optimization": {"stage": -1}}'),
    '{"zero_optimization": {"offload_optimizer": {"device": "moon"}}}',
)


def zero_json(lab: Lab, text: str) -> Verdict:
    (lab.folder / "zero.json").write_bytes(text.encode("latin-1"))
    return lab.refused("run", CONFIG, "deepspeed=zero.json")


table(RANKS, "fresh", zero_json, {"25 kinds of DeepSpeed JSON nonsense": {text or "empty": text for text in NONSENSE}})
table(
    RANKS,
    "fresh",
    zero_json,
    {
        "comms_logger nonsense": '{"zero_optimization": {"stage": 2}, "comms_logger": {"enabled": "often", "x": []}}',
        "deeply nested JSON": '{"zero_optimization": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001,
    },
)
