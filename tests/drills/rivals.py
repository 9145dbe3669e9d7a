"""`python -m tests.drills --rivals`: a few of the same faults in TRL's DPOTrainer, on a model and pairs as small."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.drills.damage import Damage, flipped, truncated
from tests.drills.injector import fault, library
from tests.drills.lab import Lab
from tests.drills.process import Done, run
from tests.drills.run import sigkill
from tests.drills.states import States

STEPS, SAVED, KILLED_AT = 6, 2, 5


def train(folder: Path, resume: bool, at_step: Callable[[int], object]) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class AtStep(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            at_step(state.global_step)

    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    settings = {"max_steps": STEPS, "save_steps": SAVED, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        args=DPOConfig(str(folder / "out"), **settings, **quiet),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        callbacks=[AtStep()],
    )
    trainer.processing_class.pad_token = trainer.processing_class.eos_token
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "out/final"))


def command(lab: Lab, resume: bool = False, kill_at: int | None = None, first: Callable = lambda: None) -> Done:
    def work() -> None:
        first()
        train(lab.folder, resume, lambda step: step == kill_at and sigkill())
        raise SystemExit(0)

    return run([], lab.folder, work, timeout=300)


def weights(lab: Lab) -> bytes:
    path = lab.folder / "out/final/model.safetensors"
    return path.read_bytes() if path.exists() else b""


def ended(done: Done, same: bool | None) -> str:
    if done.code:
        return f"unclear: {done.line}" if done.has_traceback or not done.is_clear else f"good: {done.line}"
    return {True: "good: the same weights", False: "silent: exit 0, other weights", None: "silent: exit 0"}[same]


def damaged_checkpoint(lab: Lab, name: str, how: Damage) -> None:
    path = lab.folder / f"out/checkpoint-{KILLED_AT - KILLED_AT % SAVED}" / name
    path.write_bytes(how(path.read_bytes()))


def rivals() -> int:
    try:
        import trl
    except ImportError:
        print("skipped: trl is not installed")
        return 0
    states = States()
    try:
        undisturbed = states.lab("preferences")
        assert (done := command(undisturbed)).code == 0, done.err
        faults = {
            "kill -9 in training, resumed": lambda lab: None,
            "flipped byte in a checkpoint's weights": lambda lab: damaged_checkpoint(
                lab, "model.safetensors", flipped(0.7)
            ),
            "flipped byte in a checkpoint's optimizer": lambda lab: damaged_checkpoint(
                lab, "optimizer.pt", flipped(0.5)
            ),
            "truncated checkpoint": lambda lab: damaged_checkpoint(lab, "model.safetensors", truncated()),
        }
        print(f"| drill | trl {trl.__version__} |\n|---|---|")
        for title, strike in faults.items():
            lab = states.lab("preferences")
            command(lab, kill_at=KILLED_AT)
            strike(lab)
            done = command(lab, resume=True)
            print(f"| {title} | {ended(done, weights(lab) == weights(undisturbed))} |", flush=True)
        lab = states.lab("preferences")
        path = lab.folder / "base/model.safetensors"
        tensors = load_file(path)
        next(tensor for name, tensor in tensors.items() if "q_proj" in name)[0, 0] = float("nan")
        save_file(tensors, path, {"format": "pt"})
        print(f"| NaN weight in the base | {ended(command(lab), None)} |")
        if library():
            lab = states.lab("preferences")
            done = command(lab, first=fault("full", 1, lab.folder, f"checkpoint-{2 * SAVED}"))
            then = command(lab, resume=True)
            said = f"{ended(done, None)}; with space {ended(then, weights(lab) == weights(undisturbed))}"
            print(f"| disk full in the second checkpoint | {said} |")
    finally:
        states.close()
    return 0
