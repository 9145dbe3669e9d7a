"""Sampling as `allo-fast sample` does it, against one padded batch and against transformers' continuous batching.

Prompts of uneven length, several responses each. How long a response gets is set beforehand, the same for all
contenders: exponential with mean `new` / 2, cut at `new`. (Of 80 responses of SmolLM2-135M-Instruct to questions of
GSM8K, at most 512 tokens each, the mean was 227 and nine were cut; of this distribution they are 222 and eleven.)
No end token ends one earlier; tokens are drawn with the run's temperature and top_p, by each as many.
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.utils import WorkloadHints

from allo_fast.config import ModelConfig, SampleConfig
from allo_fast.durable import versions
from allo_fast.model.decoding import Decoder
from allo_fast.model.drawing import Response, Sampler, draws_of
from allo_fast.model.loading import load_model
from benchmarks.inputs import random_llama

SETTINGS = SampleConfig()  # temperature and top_p of a run
WORDS = "Janet has a box of pens and gives three of them to each of her friends. How many are left in the end? ".split()


@dataclass(frozen=True)
class Row:
    contender: str
    tokens: int
    cpu_s: float  # of all threads; median of repeats
    tokens_per_s: float
    times_padded: float


@dataclass(frozen=True)
class Job:
    """prompts, and how many tokens each response of each prompt gets."""

    prompts: list[list[int]]
    rooms: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.rooms))


def run(
    path: str | None, dtype: str, problems: int, samples: int, new: int, repeats: int, slow: bool, out: Path | None
) -> list[Row]:
    """Prints a table, and writes JSON when `out` is given. slow: continuous batching, too. Raises AssertionError where
    greedy texts differ."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(path or random_llama(Path(folder)), ModelConfig(dtype=dtype)).eval()
    job = Job(_prompts(model, path, problems), _rooms(problems, samples, new))
    check_greedy(model, job)
    contenders = {"padded": padded, "allo-fast": in_slots}
    contenders |= {"transformers generate_batch": continuous} if slow else {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name in list(contenders)[:: 1 if repeat % 2 == 0 else -1]:
            started = time.process_time()
            lengths = contenders[name](model, job)
            seconds[name].append(time.process_time() - started)
            assert lengths == job.rooms, f"{name}: other lengths than asked"
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [Row(name, job.tokens, s, job.tokens / s, medians["padded"] / s) for name, s in medians.items()]
    lengths = [len(prompt) for prompt in job.prompts]
    print(f"{problems} prompts of {min(lengths)} to {max(lengths)} tokens, {samples} responses each, {dtype}")
    print(f"{'contender':<29}{'tokens':>8}{'cpu_s':>9}{'tokens_per_s':>14}{'times_padded':>14}")
    for row in rows:
        print(f"{row.contender:<29}{row.tokens:>8}{row.cpu_s:>9.2f}{row.tokens_per_s:>14.1f}{row.times_padded:>14.2f}")
    if out:
        said = {"model": path, "dtype": dtype, "threads": torch.get_num_threads(), "versions": versions()}
        out.write_text(json.dumps({**said, "seconds": seconds, "rows": [*map(asdict, rows)]}, indent=1))
    return rows


def in_slots(model: PreTrainedModel, job: Job) -> list[list[int]]:
    responses = _responses(job)
    sampler = Sampler(type(model).__name__, SETTINGS.temperature, SETTINGS.top_p, set())
    Decoder(model, sampler, sum(map(len, job.rooms))).run([r for same in responses for r in same])
    return [[len(response.tokens) for response in same] for same in responses]


@torch.no_grad()
def padded(model: PreTrainedModel, job: Job) -> list[list[int]]:
    """All rows from the first to the last step, each with its prompt: what `allo-fast sample` did before."""
    rooms = torch.tensor(job.rooms).view(-1)
    end, width = 0, max(map(len, job.prompts))
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in job.prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in job.prompts])
    config = GenerationConfig(
        max_new_tokens=int(rooms.max()),
        num_return_sequences=len(job.rooms[0]),
        eos_token_id=end,
        pad_token_id=end,
        do_sample=True,
        temperature=SETTINGS.temperature,
        top_p=SETTINGS.top_p,
        top_k=0,
    )

    def ends(input_ids: Tensor, scores: Tensor) -> Tensor:
        """The end token where a row's last one is due, and nowhere before."""
        due = input_ids.shape[1] + 1 - width >= rooms
        scores[:, end] = torch.where(due, scores.amax(-1) + 1e4, -torch.inf)
        return scores

    processors = LogitsProcessorList([ends])
    made = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=processors)
    lengths = (made[:, width:] != end).sum(1) + 1
    return lengths.view(len(job.rooms), -1).tolist()


def continuous(model: PreTrainedModel, job: Job) -> list[list[int]]:
    """A request for each response, as each has a length of its own; their prompts are shared by its own means."""
    config = GenerationConfig(
        max_new_tokens=max(map(max, job.rooms)),
        eos_token_id=-1,
        do_sample=True,
        temperature=SETTINGS.temperature,
        top_p=SETTINGS.top_p,
        top_k=0,
    )
    lengths = [[0] * len(rooms) for rooms in job.rooms]
    requests, longest = sum(map(len, job.rooms)), max(map(len, job.prompts))
    hints = WorkloadHints(longest, config.max_new_tokens, requests)
    pages = -(-(longest + config.max_new_tokens) // 256) * requests  # left to itself, it fills a CPU's memory
    with model.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=pages),
        workload_hints=hints,
    ) as manager:
        names = {}
        for number, (prompt, rooms) in enumerate(zip(job.prompts, job.rooms, strict=True)):
            for sample, room in enumerate(rooms):
                names[manager.add_request(prompt, max_new_tokens=room)] = number, sample
        while names:
            result = manager.get_result(timeout=3600)
            assert result and not result.error, f"continuous batching: {result.error if result else 'no result'}"
            number, sample = names.pop(result.request_id)
            lengths[number][sample] = len(result.generated_tokens)
    return lengths


@torch.no_grad()
def check_greedy(model: PreTrainedModel, job: Job, count: int = 8) -> None:
    """The likeliest tokens in slots are those of `generate`, a prompt at a time; rounding may change one of four."""
    sampler, same = Sampler(type(model).__name__, 0.0, 1.0, set()), 0
    responses = [Response(prompt, count) for prompt in job.prompts]
    Decoder(model, sampler, max(1, len(responses) // 2)).run(responses)
    config = GenerationConfig(max_new_tokens=count, eos_token_id=None, pad_token_id=0)
    for response in responses:
        ids = torch.tensor([response.prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        same += expected[0, ids.shape[1] :].tolist() == response.tokens
    assert same >= 0.75 * len(responses), f"{same} of {len(responses)} greedy texts are those of `generate`"


def _responses(job: Job) -> list[list[Response]]:
    return [
        [Response(prompt, room, draws_of(0, number, sample, room)) for sample, room in enumerate(rooms)]
        for number, (prompt, rooms) in enumerate(zip(job.prompts, job.rooms, strict=True))
    ]


def _rooms(problems: int, samples: int, new: int) -> list[list[int]]:
    draw = np.random.default_rng(0).exponential(new / 2, (problems, samples))
    return np.clip(np.ceil(draw), 1, new).astype(int).tolist()


def _prompts(model: PreTrainedModel, path: str | None, count: int) -> list[list[int]]:
    """Of 40 to 140 words; without a tokenizer of as many random tokens."""
    sizes = np.random.default_rng(1).integers(40, 141, count).tolist()
    if path is None:
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(3, model.config.vocab_size, (size,), generator=draw).tolist() for size in sizes]
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [" ".join((WORDS * 8)[start % len(WORDS) :][:size]) for start, size in enumerate(sizes)]
    if not tokenizer.chat_template:
        return [tokenizer(text).input_ids for text in texts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
