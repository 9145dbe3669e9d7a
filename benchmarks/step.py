"""One DPO training step: every weight with torch AdamW, against a selected few percent, single or in whole rows.

Same model, pairs and process shape for both; each runs in a process of its own, so that peak memory is its own.
"""

import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allo_fast.config import ModelConfig, TrainConfig
from allo_fast.data.batch import Corpus
from allo_fast.durable import versions
from allo_fast.method.objectives import Dpo
from allo_fast.method.policy import DensePolicy, SparsePolicy
from allo_fast.method.rows import row_lengths
from allo_fast.method.selection import Selection
from allo_fast.model.loading import load_model
from allo_fast.model.weights import fingerprint, named_weights
from allo_fast.training.engine import Trainer
from allo_kernels import memory


@dataclass(frozen=True)
class Row:
    method: str
    parameters: int
    selected: int
    median_ms: float
    spread_ms: float  # largest minus smallest
    tokens: int
    peak_mib: float
    state_bytes_per_parameter: float


def run(model: str | None, dtype: str, ratio: float, steps: int, out: Path | None) -> list[Row]:
    """Prints a table; writes JSON with the machine and versions when `out` is given."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = model or random_llama(Path(folder))
        rows = []
        for method in ("dense", "sparse", "rows"):
            with context.Pool(1) as pool:
                rows.append(pool.apply(_measure, (method, str(path), dtype, ratio, steps)))
    print(f"{'method':<8}{'median_ms':>11}{'spread_ms':>11}{'peak_mib':>10}{'state_bytes_per_parameter':>27}")
    for row in rows:
        print(
            f"{row.method:<8}{row.median_ms:>11.0f}{row.spread_ms:>11.0f}{row.peak_mib:>10.0f}"
            f"{row.state_bytes_per_parameter:>27.3f}"
        )
    if out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        held = {"device": device, "model": model, "dtype": dtype, "ratio": ratio, "versions": versions()}
        out.write_text(json.dumps({**held, "date": time.strftime("%Y-%m-%d"), "rows": [*map(asdict, rows)]}, indent=1))
    return rows


def random_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _measure(method: str, path: str, dtype: str, ratio: float, steps: int) -> Row:
    config = ModelConfig(dtype=dtype)
    model = load_model(path, config)
    if method == "dense":  # as the warm-up trains: float32 weights, matrix products in the base's dtype
        policy = DensePolicy(model.float(), None if dtype == "float32" else getattr(torch, dtype))
    else:
        scores = {name: torch.rand(weight.shape) for name, weight in named_weights(model).items()}
        lengths = row_lengths(model) if method == "rows" else None
        policy = SparsePolicy(model, Selection.from_scores(scores, ratio, base=fingerprint(model), rows=lengths))
        del scores
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainConfig(
            learning_rate=1e-5, gradient_accumulation_steps=1, num_train_epochs=steps + 1, save_steps=10**9
        )
        trainer = Trainer(policy, pairs(model.config.vocab_size), Dpo(0.1, 0.5), settings, Path(folder))
        memory.reset_peak(model.device)
        metrics = list(trainer.run())[1:]  # the first step warms up
    times = [1e3 * row.seconds for row in metrics]
    return Row(
        method=method,
        parameters=policy.parameters,
        selected=sum(len(at) for at in policy.positions.values()) if method != "dense" else policy.parameters,
        median_ms=statistics.median(times),
        spread_ms=max(times) - min(times),
        tokens=metrics[0].tokens,
        peak_mib=memory.peak_bytes(model.device) / 2**20,
        state_bytes_per_parameter=sum(trainer.state_bytes().values()) / policy.parameters,
    )


def pairs(vocabulary: int) -> Corpus:
    """Four problems of 64 tokens with two responses of 48 each."""
    draw = torch.Generator().manual_seed(0)
    corpus = Corpus()
    for _ in range(4):
        prompt, *responses = (torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in (64, 48, 48))
        corpus.examples.append(tuple(corpus.add(prompt, responses)))
    return corpus
