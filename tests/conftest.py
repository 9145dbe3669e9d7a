import gc
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers and datasets are imported
# Before anything imports Triton, which asks then: without a GPU, its kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from transformers import LlamaConfig, LlamaForCausalLM

from allo_fast.data import problems
from allo_fast.data.corpus import Corpus
from allo_fast.data.problems import Problem, Quarantined
from allo_fast.method.selection import Selection
from allo_fast.model.weights import fingerprint, named_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton's kernels run
SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# A run of every stage, in seconds.
MICRO = """
name: micro
output_dir: {folder}
seeds: [0, 1]
rivals: [dpo]
model: {{dtype: float32}}
data:
  train: arithmetic:train[1000:1006]
  test: arithmetic:test[:8]
  prompt_template: "{{}}="
pretrain:
  {{problems: 32, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
   per_device_train_batch_size: 8, save_steps: 1}}
sample: {{max_new_tokens: 12, num_return_sequences: 3, batch_size: 1}}
pairs: {{gold: missing}}
locate: {{score: delta, windows: 32}}
warmup: {{learning_rate: 1e-4, gradient_accumulation_steps: 1, save_steps: 1}}
rewards: {{template: "{{}}#{{}}#{{}}>", train: {{num_train_epochs: 1, gradient_accumulation_steps: 1, save_steps: 1}}}}
forget: {{learning_rate: 1e-3, threshold: 0.03, gradient_accumulation_steps: 1, save_steps: 1}}
learn: {{learning_rate: 1e-3, gradient_accumulation_steps: 1, ratio: 0.1, save_steps: 1}}
evaluate: {{max_new_tokens: 12, batch_size: 1}}
"""

SAME_BITS = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU attention's backward adds up in another order each time"
)
# A rotary embedding that changes with the longest row beyond `max_position_embeddings`.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}


def pytest_configure(config):
    for number in (signal.SIGHUP, signal.SIGTERM):  # which whoever began this may have had ignored
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # two xdist workers share two cores


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what is imported stays: no stage of a run looks for garbage there


def pytest_sessionfinish():
    gc.unfreeze()  # an interpreter with frozen objects cannot be taken down in order


def shared(name: str) -> Path:
    """A reference file beside the checkout, where there is one."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference file {name} is not beside this checkout")
    return path


@pytest.fixture(autouse=True)
def everything_is_said():
    """Benchmarks that ran in this process before silence the engine."""
    logging.getLogger("allo_fast").setLevel(logging.NOTSET)


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY | changes)).eval()


def random_selection(model, ratio: float = 0.05, seed: int = 1) -> Selection:
    draw = torch.Generator().manual_seed(seed)
    weights = named_weights(model).items()
    scores = {name: torch.rand(weight.shape, generator=draw).to(weight.device) for name, weight in weights}
    return Selection.from_scores(scores, ratio, base=fingerprint(model))


def pair_corpus(problems: int = 6, seed: int = 0) -> Corpus:
    """Problems with three responses of unlike lengths; two pairs each."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        return torch.randint(3, 61, (int(torch.randint(low, high, (1,), generator=draw)),), generator=draw).tolist()

    corpus = Corpus()
    for number in range(problems):
        right, *wrong = corpus.add(tokens(3, 9), [tokens(2, 9) for _ in range(3)], f"row:{number}")
        corpus.examples += [(right, index) for index in wrong]
    return corpus


def units_read(manifest: dict) -> set[str]:
    """Of which units of its run, as "pairs/seed-0", a unit depends."""
    return {"/".join(name.split("/")[:2])[3:] for name in manifest["basis"] if "/" in name}


def apart(outcomes) -> tuple[list, list[Quarantined]]:
    """What is usable of a stream, and what is set aside."""
    outcomes = list(outcomes)
    aside = [outcome for outcome in outcomes if isinstance(outcome, Quarantined)]
    return [outcome for outcome in outcomes if not isinstance(outcome, Quarantined)], aside


def read_problems(source: str, format: str) -> tuple[list[Problem], list[Quarantined]]:
    return apart(problems.read_problems(source, format))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A config file and the folder of its finished run; tests that take it are in one xdist_group."""
    from allo_fast.__main__ import main

    folder = tmp_path_factory.mktemp("runs")
    config = folder / "micro.yaml"
    config.write_text(MICRO.format(folder=folder))
    assert main(["run", str(config)]) == 0
    return config, folder / "micro"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be changed."""
    config = tmp_path / "micro.yaml"
    config.write_text(MICRO.format(folder=tmp_path))
    shutil.copytree(finished[1], tmp_path / "micro")
    text = (tmp_path / "micro" / "config.yaml").read_text()
    (tmp_path / "micro" / "config.yaml").write_text(text.replace(str(finished[0].parent), str(tmp_path)))
    return config, tmp_path / "micro"
