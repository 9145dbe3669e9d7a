"""How many preference rows a run can have: seconds and memory of what stages do with all of them, but for training.

    sample      reads the rows, and makes tokens of them        pairs      pairs them
    learn       the corpus, its order, one batch                reference  a file for log-probabilities of all pairs
    rewards     the rejected responses, a reward for each token
    forget      as learn, of these                              sft        as learn, of right responses

Models are left out: their log-probabilities are constants, or chance. Each stage runs in a process of its own, whose
memory its parent looks at every few milliseconds: anonymous memory, which cannot be given back, less what the imports
took, and all that is resident, the pages of mapped files among it.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from allo_fast.config import Config
from allo_fast.data.batch import Batch, Layout
from allo_fast.data.corpus import Corpus
from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.durable import versions
from allo_fast.runs.rows import read_jsonl, rendered_once
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, forget, pairs, responses, sample, sft
from allo_fast.training.examples import Examples
from allo_fast.training.reference import Opened, reference_logps

_LOOK_SECONDS = 0.01
_WORDS, _SENTENCES, _ANSWERS = 2000, 24, 18  # words: different ones, in a prompt, in a response on average


@dataclass(frozen=True)
class Row:
    stage: str
    cpu_seconds: float
    seconds: float
    anonymous_mib: float  # most beyond what the imports took
    total_mib: float  # most that was resident, imports and mapped files included
    files_mib: float  # on the disk when the stage has ended, the data itself included


def run(rows: int, out: Path | None) -> list[Row]:
    """Prints a table; writes JSON when `out` is given."""
    names = [field.name for field in fields(Row)]
    print("".join(f"{name:>15}" for name in names))
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), rows)
        for name in WORK:
            measured.append(row := _measured(name, Path(folder)))
            print(f"{name:>15}" + "".join(f"{getattr(row, key):>15.1f}" for key in names[1:]), flush=True)
    if out:
        about = {"examples": rows, "versions": versions(), "date": time.strftime("%Y-%m-%d")}
        out.write_text(json.dumps({**about, "rows": [*map(asdict, measured)]}, indent=1))
    return measured


def make(folder: Path, rows: int) -> None:
    """train.jsonl, of 400 bytes a row, and base: a tiny Llama with a tokenizer that knows the words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(_WORDS)]

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(count // 2, count * 3 // 2)))

    with (folder / "train.jsonl").open("w") as file:
        for _ in range(rows):
            row = {"prompt": text(_SENTENCES)} | {side: "\n" + text(_ANSWERS) for side in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator([text(_SENTENCES) for _ in range(2000)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    made.save_pretrained(folder / "base")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(made), **sizes)).save_pretrained(folder / "base")


def _measured(name: str, folder: Path) -> Row:
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.data", name, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdout.readline()  # everything is imported
    imported, total = _resident(child.pid)
    anonymous = imported
    child.stdin.close()  # go
    while child.poll() is None:
        now = _resident(child.pid)
        anonymous, total = max(anonymous, now[0]), max(total, now[1])
        time.sleep(_LOOK_SECONDS)
    if child.returncode:
        sys.exit(f"{name}: ended with {child.returncode}")
    cpu, seconds = map(float, child.stdout.read().split())
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Row(name, cpu, seconds, (anonymous - imported) / 1024, total / 1024, files / 2**20)


def _resident(process: int) -> tuple[int, int]:
    """Anonymous memory and all that is resident, in KiB."""
    status = Path(f"/proc/{process}/status").read_text()
    # A process that has just ended has none.
    return tuple(int(status.split(f"{name}:")[1].split()[0]) if name in status else 0 for name in ("RssAnon", "VmRSS"))


def open_run(folder: Path) -> Run:
    """On what `make` left there."""
    settings = {"method": "sparse-dpo", "pairs": {"max_pairs": 1}, "output_dir": str(folder / "runs"), "name": "data"}
    data = {"train": str(folder / "train.jsonl"), "test": str(folder / "train.jsonl[:1]"), "format": "preference"}
    config = Config(**settings, data=data, model={"name_or_path": str(folder / "base"), "dtype": "float32"})
    run = Run(config, STAGES)
    run.home.take_config(config, False)
    return run


def _run_stage(name: str, folder: Path) -> None:
    run = open_run(folder)
    print("ready", flush=True)
    sys.stdin.read()
    cpu, wall = time.process_time(), time.perf_counter()
    WORK[name](run)
    print(time.process_time() - cpu, time.perf_counter() - wall)


def _unit(run: Run, stage: str) -> Unit:
    unit = Unit(run, stage, "base" if stage == "sft" else "seed-0")
    unit.folder.mkdir(parents=True, exist_ok=True)
    return unit


def _sample(run: Run) -> None:
    _exhaust(sample.execute(_unit(run, "sample")))


def _pairs(run: Run) -> None:
    _exhaust(pairs.execute(_unit(run, "pairs")))


def _pair_corpus(run: Run) -> Corpus:
    return corpus_of_pairs(read_jsonl(_unit(run, "pairs").folder / "pairs.jsonl"), _unit(run, "learn").folder)


def _learn(run: Run) -> None:
    examples = Examples(_pair_corpus(run), run.config.learn)
    examples.collate((0,))


def _reference(run: Run) -> None:
    examples = Examples(_pair_corpus(run), run.config.learn)
    opened = nullcontext(Opened(lambda batch: -batch.valid.float(), Layout(), torch.device("cpu")))
    asked = examples.responses(range(len(examples)))
    _exhaust(reference_logps(_unit(run, "learn").folder, "", examples.corpus, asked, opened))


def _rewards(run: Run) -> None:
    unit, draw = _unit(run, "rewards"), torch.Generator().manual_seed(0)
    rows = rendered_once(unit, "wrong.jsonl", lambda: responses.wrong_responses(unit))

    def score(batch: Batch) -> Tensor:
        return torch.rand(batch.valid.shape, generator=draw)

    _exhaust(responses.rewarded(unit, rows, Opened(score, Layout(), torch.device("cpu"))))


def _forget(run: Run) -> None:
    rows = read_jsonl(_unit(run, "rewards").folder / "rewards.jsonl")
    corpus, weights = forget.weighted_corpus(rows, 0.5, _unit(run, "forget").folder)
    Examples(corpus, run.config.forget, token_weights=weights).collate((0,))


def _sft(run: Run) -> None:
    rows = read_jsonl(_unit(run, "sample").folder / "problems.jsonl")
    Examples(sft.corpus_of_right_responses(rows, None, 0, _unit(run, "sft").folder), run.config.learn).collate((0,))


def _exhaust(work: Iterator) -> None:
    for _ in work:
        pass


# In a run's order.
WORK: dict[str, Callable[[Run], None]] = {
    "sample": _sample,
    "pairs": _pairs,
    "learn": _learn,
    "reference": _reference,
    "rewards": _rewards,
    "forget": _forget,
    "sft": _sft,
}


if __name__ == "__main__":
    _run_stage(sys.argv[1], Path(sys.argv[2]))
