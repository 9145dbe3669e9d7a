"""Numbers that are not finite, or that say nothing: a run stops, and no evaluation calls them right."""

import json
import re
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

from tests.drills.drill import drill, table
from tests.drills.jobs import ignore_case, pair
from tests.drills.lab import Lab, Verdict
from tests.drills.run import CONFIG, LEARN, WARMUP

NUMBERS = "Numbers"
Tensors = dict[str, torch.Tensor]
LAST = "learning_rate=1e38"


def with_base(lab: Lab, change: Callable[[Tensors], object]) -> None:
    path = lab.folder / "base/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def set_weight(part: str, value: float, row: int = 0) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        next(tensor for name, tensor in tensors.items() if part in name)[row, 0] = value

    return change


def bad_base(lab: Lab, how: tuple) -> Verdict:
    """how: a change to the base, and the command that must be refused."""
    change, *words = how
    with_base(lab, change)
    return lab.refused(*words)


NAN = set_weight("q_proj", float("nan"))
UNUSED = set_weight("embed_tokens", float("nan"), row=-1)
RUN = ("run", CONFIG)
table(
    NUMBERS,
    "preferences",
    bad_base,
    {
        "NaN weight: training": (NAN, *RUN),
        "NaN weight: eval, preference": (NAN, "eval", "base", CONFIG),
        "NaN in an unused embedding row": (UNUSED, *RUN),
        "Inf weight: training": (set_weight("q_proj", float("inf")), *RUN),
    },
)
table(
    NUMBERS,
    "fresh",
    bad_base,
    {
        "NaN weight: eval, generated answers": (NAN, "eval", "base", CONFIG),
        "NaN weight: sampling": (NAN, "sample", CONFIG),
    },
)


def not_all_right(done) -> str:
    return "said to be right: 100 %" if re.search(r"\b100(\.0+)? ?%", done.out) else ""


@drill(NUMBERS, "all-zero model: eval", "preferences")
def zero_model(lab: Lab) -> Verdict:
    with_base(lab, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    return lab.judged(not_all_right, "eval", "base", CONFIG, refusal=True)


@drill(NUMBERS, "20 pairs the tokenizer cannot tell apart", "preferences")
def same_tokens(lab: Lab) -> Verdict:
    ignore_case(lab.folder / "base")
    rows = [pair(number, chosen="yes.", rejected="YES.") for number in range(20)]
    (lab.folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lab.judged(not_all_right, "eval", "base", CONFIG, refusal=True)


def overflowing(lab: Lab, how: tuple[str, str, str]) -> Verdict:
    """how: stage, its unit, and a setting. One step, whose loss is finite; the weights after it are not."""
    stage, unit, setting = how
    steps = [f"{stage}.gradient_accumulation_steps=1000", f"{stage}.num_train_epochs=1"]
    settings = [f"{stage}.{setting}", *steps, f"{stage}.warmup_steps=0", f"{stage}.lr_scheduler_type=constant"]
    verdict = lab.refused("run", CONFIG, *settings)
    saved = (lab.run / unit / "model").exists() or (lab.run / unit / "delta.safetensors").exists()
    return Verdict("silent", f"saved; {verdict.said}") if saved else verdict


table(
    NUMBERS,
    "preferences",
    overflowing,
    {
        "lr 1e38, warm-up's last step": ("warmup", WARMUP, LAST),
        "lr 1e38, learn's last step": ("learn", LEARN, LAST),
    },
)


def setting(lab: Lab, words: str) -> Verdict:
    return lab.judged(not_all_right, "run", CONFIG, *words.split(), refusal=True)


table(NUMBERS, "preferences", setting, {"lr 1e6, warm-up": "method=dpo warmup.learning_rate=1e6"})


def refused_setting(lab: Lab, words: str) -> Verdict:
    return lab.refused("run", CONFIG, *words.split())


table(
    NUMBERS,
    "preferences",
    refused_setting,
    {"lr .inf": "method=dpo warmup.learning_rate=.inf", "beta .inf": "method=dpo warmup.beta=.inf"},
)
