"""What a step of DPO costs, and what it holds, against the model's size, the ratio and the shape of the data.

Measured: CPU seconds of an optimizer step (the reference's values are there already) of random Llamas of 1M to 148M
weights, 5 % of whose weights train or all of them, one thing varied at a time around `BASE`. Planned, from 1B to 70B:
model states of each device of a job, by the same code as `allo-fast plan`. Writes scaling.json and scaling.svg.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from allo_fast.config import TrainConfig
from allo_fast.data.corpus import Corpus
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Preference
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.weights import fingerprint, named_weights
from allo_fast.plan.costs import dense_dpo_states, states
from allo_fast.plan.shapes import weights_of
from allo_fast.training.engine import Trainer
from allo_fast.training.zero import Zero
from benchmarks.step import machine

ROOT = Path(__file__).parents[1]
WIDTHS = {"1M": (96, 4), "3M": (160, 6), "9M": (256, 10), "35M": (448, 14), "148M": (576, 30)}  # hidden size, layers
VOCABULARY = {"148M": 49152}  # of the others 4096
PLANNED = ("llama3_2_1b", "llama3_2_3b", "llama3_8b", "llama3_70b")
DEVICES = 8
STEPS = 3  # the first is not counted


@dataclass(frozen=True)
class Point:
    """ratio None: every weight trains. Lengths in tokens; each of a problem's responses but the first is a pair's."""

    size: str = "9M"
    ratio: float | None = 0.05
    prompt: int = 128
    response: int = 128
    responses: int = 2
    problems: int = 4  # of a step


BASE = Point()
VARIED: dict[str, list[Point]] = {
    "weights": [replace(BASE, size=size) for size in WIDTHS],
    "ratio": [replace(BASE, ratio=ratio) for ratio in (0.01, 0.02, 0.05, 0.1, 0.2)],
    "prompt share": [replace(BASE, prompt=n, response=256 - n) for n in (16, 64, 128, 192, 240)],
    "tokens of a sequence": [replace(BASE, prompt=n // 2, response=n // 2) for n in (64, 128, 256, 512, 1024)],
    "responses a prompt": [replace(BASE, responses=count) for count in (2, 3, 5, 9)],
}


@dataclass(frozen=True)
class Row:
    varied: str
    point: Point
    parameters: int
    cpu_seconds: float  # of a step: the median
    pairs: int  # of a step
    useful_tokens: int  # of a step
    state_bytes: int


@dataclass(frozen=True)
class Plan:
    model: str
    parameters: int
    zero_stage: int
    sparse_bytes: int  # model states of each of DEVICES devices, 5 % in bfloat16
    dense_bytes: int  # dense DPO's, bfloat16 with float32 optimizer and a copy as reference


def run(out: Path | None = None) -> tuple[list[Row], list[Plan]]:
    """Prints tables; `out`: a folder for scaling.json and scaling.svg."""
    rows: list[Row] = []
    print(f"{'varied':<22}{'weights':>9}{'trained':>9}{'prompt':>8}{'response':>10}{'responses':>11}", end="")
    print(f"{'CPU s/step':>12}{'us/useful token':>17}{'bytes/weight':>14}")
    for varied, points in VARIED.items():
        for point in points:
            for each in (point, replace(point, ratio=None)) if varied != "ratio" else (point,):
                rows.append(row := measure(varied, each))
                print(_line(row), flush=True)
    plans = [plan for model in PLANNED for plan in _plans(model)]
    print(f"{'model':<14}{'ZeRO':>5}{f'GB a device of {DEVICES}, 5 %':>24}{'dense DPO':>11}")
    for plan in plans:
        gigabytes = f"{plan.sparse_bytes / 1e9:>24.1f}{plan.dense_bytes / 1e9:>11.1f}"
        print(f"{plan.model:<14}{plan.zero_stage:>5}{gigabytes}")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        found = {**machine(), "rows": [*map(asdict, rows)], "plans": [*map(asdict, plans)]}
        (out / "scaling.json").write_text(json.dumps(found, indent=1))
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            plot(rows, plans).savefig(out / "scaling.svg", metadata={"Date": None})
    return rows, plans


def measure(varied: str, point: Point) -> Row:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(point.size)).eval()
    parameters = sum(weight.numel() for weight in model.parameters())
    corpus = draw(point, model.config.vocab_size)
    train = TrainConfig(
        learning_rate=1e-6,
        num_train_epochs=STEPS,
        per_device_train_batch_size=len(corpus.examples),
        max_tokens_per_batch=max(1024, *(_tokens(corpus, example) for example in corpus.examples)),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(_policy(model, point.ratio), corpus, Preference(0.1), train, Path(folder))
        for _ in trainer.prepare():
            pass
        seconds, started = [], time.process_time()
        for metrics in trainer.run():
            seconds.append(time.process_time() - started)
            started, tokens = time.process_time(), metrics.tokens
        held = sum(trainer.state_bytes().values())
    return Row(
        varied=varied,
        point=point,
        parameters=parameters,
        cpu_seconds=statistics.median(seconds[1:]),
        pairs=len(corpus.examples),
        useful_tokens=tokens,
        state_bytes=held,
    )


def llama(size: str) -> LlamaConfig:
    """About as many weights as its name says."""
    width, layers = WIDTHS[size]
    return LlamaConfig(
        vocab_size=VOCABULARY.get(size, 4096),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def draw(point: Point, vocabulary: int) -> Corpus:
    """Its problems: pairs of the first response with each of the others."""
    tokens, corpus = torch.Generator().manual_seed(1), Corpus()

    def text(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=tokens).tolist()

    for _ in range(point.problems):
        first, *others = corpus.add(text(point.prompt), [text(point.response) for _ in range(point.responses)])
        for other in others:
            corpus.examples.append((first, other))
    return corpus


def plot(rows: list[Row], plans: list[Plan]) -> Figure:
    """CPU microseconds a useful token against what is varied, one panel each, and the plan's bytes."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axis, varied in zip(panels, VARIED, strict=False):
        _curves(axis, varied, [row for row in rows if row.varied == varied])
    axis = panels[-1]
    for name, label in (("sparse_bytes", "5 %"), ("dense_bytes", "dense DPO")):
        whole = [plan for plan in plans if plan.zero_stage == 3]
        axis.plot([p.parameters for p in whole], [getattr(p, name) / 1e9 for p in whole], marker="o", label=label)
    axis.set(xscale="log", yscale="log", xlabel="weights", title=f"planned: GB a device of {DEVICES}, ZeRO-3")
    axis.minorticks_off()
    axis.legend()
    return figure


def _curves(axis: Axes, varied: str, rows: list[Row]) -> None:
    for label, dense in (("sparse", False), ("dense", True)):
        mine = [row for row in rows if (row.point.ratio is None) == dense]
        if mine:
            axis.plot(
                [_place(varied, row) for row in mine],
                [1e6 * row.cpu_seconds / row.useful_tokens for row in mine],
                marker="o",
                label=label,
            )
    logarithmic = varied not in ("prompt share", "responses a prompt")
    axis.set(xlabel=varied, title="CPU microseconds a useful token", xscale="log" if logarithmic else "linear")
    axis.set_yscale("log" if varied == "weights" else "linear")
    axis.set_ylim(bottom=None if varied == "weights" else 0)
    axis.legend()


def _place(varied: str, row: Row) -> float:
    point = row.point
    return {
        "weights": row.parameters,
        "ratio": point.ratio,
        "prompt share": point.prompt / (point.prompt + point.response),
        "tokens of a sequence": point.prompt + point.response,
        "responses a prompt": point.responses,
    }[varied]


def _line(row: Row) -> str:
    point = row.point
    trained = "all" if point.ratio is None else f"{point.ratio:.0%}"
    shape = f"{point.prompt:>8}{point.response:>10}{point.responses:>11}"
    cost = f"{row.cpu_seconds:>12.3f}{1e6 * row.cpu_seconds / row.useful_tokens:>17.0f}"
    held = row.state_bytes / row.parameters
    return f"{row.varied:<22}{row.parameters / 1e6:>8.1f}M{trained:>9}{shape}{cost}{held:>14.2f}"


def _policy(model: LlamaForCausalLM, ratio: float | None) -> DensePolicy | SparsePolicy:
    if ratio is None:
        return DensePolicy(model)
    chance = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(weight.shape, generator=chance) for name, weight in named_weights(model).items()}
    return SparsePolicy(model, Selection.from_scores(scores, ratio, base=fingerprint(model)))


def _tokens(corpus: Corpus, example: tuple[int, ...]) -> int:
    prompt = len(corpus.prompts[int(corpus.responses.prompts[example[0]])])
    return prompt + sum(len(corpus.responses[number].tokens) - 1 for number in example)


def _plans(model: str) -> Iterator[Plan]:
    weights = weights_of(AutoConfig.from_pretrained(ROOT / f"configs/models/{model}.json"), "bfloat16")
    for stage in (0, 3):
        sparse = states(weights, "bfloat16", BASE.ratio, Zero(stage), DEVICES)
        dense = dense_dpo_states(weights.parameters, Zero(stage), DEVICES)
        yield Plan(model, weights.parameters, stage, sum(sparse.values()), dense)
