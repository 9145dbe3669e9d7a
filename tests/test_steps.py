"""How a step is cut into micro-batches: within the budget, whole problems together, and what it trains does not depend
on it."""

import traceback

import numpy as np
import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from allo_fast.config import LearnConfig, TrainConfig, UserError
from allo_fast.data.batch import Layout, collate
from allo_fast.method.objectives import Npo, Preference, Sft
from allo_fast.method.policy import SparsePolicy
from allo_fast.training.engine import Trainer
from allo_fast.training.examples import Examples
from allo_fast.training.reference import micro_batches
from allo_fast.training.steps import cut

SETTINGS = {"learning_rate": 1e-2, "warmup_steps": 1, "per_device_train_batch_size": 3, "num_train_epochs": 2}
SETTINGS |= {"gradient_accumulation_steps": 2}


def examples_of(budget: int | None, problems: int = 6) -> Examples:
    return Examples(pair_corpus(problems), TrainConfig(**SETTINGS, max_tokens_per_batch=budget))


def test_micro_batches_keep_to_the_budget_and_problems_together():
    longest = max(examples_of(None).tokens((n,)) for n in range(12))
    for budget in (longest, 40, 64, 1000):
        examples = examples_of(budget)
        for step, numbers in enumerate(examples.steps):
            micros = examples.micro_batches(step)
            assert sorted(number for micro in micros for number in micro) == sorted(numbers)
            assert all(examples.tokens(micro) <= budget for micro in micros)
            batches = [examples.collate(micro) for micro in micros]
            assert [batch.tokens for batch in batches] == [*map(examples.tokens, micros)]
            if budget >= 64:
                assert len(micros) == 1 or budget == 64, "no more than it takes"
                responses = [response for batch in batches for response in batch.responses.tolist()]
                assert len(responses) == len(set(responses)), "each distinct response is computed once"


@pytest.mark.parametrize("layout", [Layout(), Layout(share_prompts=False), Layout(packed=True)])
def test_no_micro_batch_computes_more_positions_than_the_budget(layout):
    """Padding and repeated prompts of models that cannot pack are counted; only a single example may be more."""
    for budget in (25, 40, 90, 200):
        examples = examples_of(budget)
        examples.layout = layout
        for step, numbers in enumerate(examples.steps):
            micros = examples.micro_batches(step)
            assert sorted(number for micro in micros for number in micro) == sorted(numbers)
            computed = [examples.collate(micro).input_ids.numel() for micro in micros]
            assert all(size <= budget for micro, size in zip(micros, computed, strict=True) if len(micro) > 1)
            if budget == 200:
                assert len(micros) == 1
    corpus, responses = examples.corpus, np.arange(len(examples.corpus.responses))
    micros = list(micro_batches(corpus, responses, layout, 90))
    batches = [collate(corpus, [(number,) for number in micro], layout) for micro in micros]
    assert sorted(number for micro in micros for number in micro) == responses.tolist()
    assert len(micros) > 1 and all(batch.input_ids.numel() <= 90 for batch in batches)


def test_rows_of_one_width_go_together():
    widths = [9, 2, 9, 2, 2, 3]
    micros = cut(list(range(6)), lambda n: n, lambda group: (len(group), max(widths[n] for n in group)), budget=18)
    assert micros == [(0, 2), (1, 3, 4, 5)]
    divided = cut(list(range(6)), lambda n: n, lambda group: (len(group), max(widths[n] for n in group)), 18, ranks=3)
    assert sorted(divided) == [(0, 2), (1, 5), (3, 4)]


def test_problems_stay_together_in_every_epoch():
    corpus = pair_corpus(problems=7)
    corpus.examples = [pair for pair in corpus.examples for _ in range(2)]  # four of each problem
    settings = {**SETTINGS, "num_train_epochs": 3, "gradient_accumulation_steps": 4}
    examples = Examples(corpus, TrainConfig(**settings))
    orders = []
    for epoch in examples.epochs:
        assert sorted(epoch.rows.tolist()) == list(range(28)) and [*map(len, epoch)] == [12, 12, 4]
        problems = [examples._problem(number) for step in epoch for number in step]
        orders.append(problems[::4])
        assert problems == [problem for problem in orders[-1] for _ in range(4)]
    assert len(set(map(tuple, orders))) == 3, "each epoch has another order"


def test_a_group_beyond_the_budget_is_cut_between_examples():
    sizes = {(0, 1, 2, 3): 19, (0, 1): 10, (0, 1, 2): 14, (2, 3): 9, (2,): 6, (0,): 6, (4,): 5, (0, 1, 2, 4): 18}
    micros = cut([0, 1, 2, 3, 4], lambda n: n // 4, lambda group: (sizes[tuple(group)], 1), budget=10)
    assert sorted(micros) == [(0, 1), (2, 3), (4,)]


def test_ranks_get_as_many_micro_batches_each():
    for ranks in (1, 2, 3, 4):
        micros = cut(list(range(8)), lambda n: n, lambda group: (10 * len(group), 1), budget=40, ranks=ranks)
        assert len(micros) % ranks == 0 and sorted(sum(micros, ())) == list(range(8))
        assert max(map(len, micros)) - min(map(len, micros)) <= 1, "all are about as large"
    assert len(cut([0, 1], lambda n: n, lambda group: (10 * len(group), 1), budget=40, ranks=3)) == 2


def test_what_is_longer_than_the_budget_is_set_aside_and_said(caplog):
    sizes = sorted(examples_of(None).tokens((n,)) for n in range(12))
    budget = sizes[-3] - 1
    examples = examples_of(budget)
    assert 3 <= examples.set_aside < 12 and len(examples) == 12 - examples.set_aside
    said = f"max_tokens_per_batch: {budget}: {examples.set_aside} of 12 examples have more tokens; the longest, row:"
    assert said in caplog.text and f", has {sizes[-1]}; they are set aside" in caplog.text
    with pytest.raises(UserError, match=f"^max_tokens_per_batch: 3: 12 of 12 examples.*at least {sizes[0]}, the sh"):
        examples_of(3)
    with pytest.raises(UserError, match="^learn.max_tokens_per_batch: 3: "):
        Examples(pair_corpus(), LearnConfig(max_tokens_per_batch=3))


def trained(folder, objective=None, **changes) -> tuple[list, torch.Tensor]:
    """What is said of each step, and the weights in the end."""
    model, corpus = tiny_llama(), pair_corpus()
    if isinstance(objective, Npo | Sft):
        corpus.examples = [(index,) for index in range(len(corpus.responses))]
    lengths = corpus.responses.tokens.lengths.tolist()
    weights = [[(column + index) % 3 / 2 for column in range(length)] for index, length in enumerate(lengths)]
    folder.mkdir()
    given = {"token_weights": weights, "online": changes.pop("online", False)}
    policy, config = SparsePolicy(model, random_selection(model)), TrainConfig(**SETTINGS | changes)
    metrics = list(Trainer(policy, corpus, objective or Preference(0.5, 0.5), config, folder, **given).run())
    kept = [(m.loss, m.grad_norm, *m.metrics.values()) for m in metrics]
    return kept, torch.cat([value.detach() for value in policy.values.values()])


@pytest.mark.parametrize("objective", [Preference(0.5, 0.5), Npo(0.5), Sft()], ids=["dpo", "npo", "sft"])
def test_nothing_depends_on_the_budget(tmp_path, objective):
    """DPO's key tokens too: they are chosen by responses, not by what lies beside them."""
    rows, values = trained(tmp_path / "none", objective)
    for budget in (30, 64, 4096):
        others, found = trained(tmp_path / str(budget), objective, max_tokens_per_batch=budget)
        torch.testing.assert_close(torch.tensor(others), torch.tensor(rows), rtol=1e-3, atol=1e-5)
        assert (found - values).abs().mean() < 1e-6


def test_an_online_reference_is_the_cached_one(tmp_path):
    cached, values = trained(tmp_path / "cached")
    online, found = trained(tmp_path / "online", online=True)
    torch.testing.assert_close(torch.tensor(online), torch.tensor(cached), rtol=1e-4, atol=1e-6)
    assert (found - values).abs().mean() < 1e-7
    assert list(tmp_path.glob("cached/scratch/reference-*/*")) and not list(tmp_path.glob("online/scratch/*"))


def on_a_cpu_alone() -> bool:
    """Whether a definition asks, or a check, that a GPU's tensors never come to."""
    frames = traceback.extract_stack()
    files = ("head_torch.py", "positions.py", "sampled.py")
    names = ("_check_targets", "_stack", "_at_most")
    return any(frame.name in names or frame.filename.endswith(files) for frame in frames)


class Waits(TorchDispatchMode):
    """Counts what a GPU would make the host wait for: numbers of tensors that somebody asks for."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (name in self.NAMES or masks) and not on_a_cpu_alone():
            self.seen.append(name)
        return function(*args, **kwargs or {})


class Reads(TorchFunctionMode):
    """Counts what reads a tensor past the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__) and not on_a_cpu_alone():
            self.seen.append(function.__name__)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("objective", [Preference(0.5, 0.5), Npo(0.5), Sft()], ids=["dpo", "npo", "sft"])
def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch, objective):
    counted = []
    step = Trainer._step

    def watched(*given):
        with Reads() as reads, Waits() as waits:
            metrics = step(*given)
        counted.append(reads.seen + waits.seen)
        return metrics

    monkeypatch.setattr(Trainer, "_step", watched)
    trained(tmp_path / "a", objective, max_tokens_per_batch=30)
    assert counted == [["tolist"]] * len(counted) and counted, "one read a step, of all that is logged"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_waits_once(tmp_path, monkeypatch):
    read = Trainer._read

    def allowed(*given):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(*given)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    monkeypatch.setattr(Trainer, "_read", allowed)
    model = tiny_llama(head_dim=16).cuda()  # smaller heads go piece by piece, which asks the host
    policy = SparsePolicy(model, random_selection(model))
    running = Trainer(policy, pair_corpus(), Preference(0.5), TrainConfig(**SETTINGS), tmp_path).run()
    next(running)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(running)) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_error_while_the_next_step_is_collated_ends_training(tmp_path, monkeypatch):
    def fails(self, micro):
        raise UserError("no room")

    monkeypatch.setattr(Examples, "collate", fails)
    with pytest.raises(UserError, match="no room"):
        trained(tmp_path / "a", Sft())
