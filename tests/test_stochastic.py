"""Values rounded into a bfloat16 base by chance: by whomever they are written, read or made again, the same bits."""

import copy
from collections import deque

import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama

from allo_fast.config import TrainConfig, UserError
from allo_fast.data.batch import collate
from allo_fast.method.delta import Delta
from allo_fast.method.objectives import Preference
from allo_fast.method.optim import SparseAdamW
from allo_fast.method.policy import SparsePolicy
from allo_fast.model.weights import named_weights, same_bits
from allo_fast.training.engine import Trainer
from allo_kernels.rounding import rounded

LOW = 1e-7  # a learning rate whose steps are far below bfloat16's


def policy_on(base, rounding_seed=3, start=None, selected_by=1):
    """On a copy of `base`."""
    model = copy.deepcopy(base)
    return SparsePolicy(model, random_selection(base, 0.3, selected_by), start, rounding_seed=rounding_seed)


def train(policy, lr=1e-2, steps=3):
    optimizer, corpus = SparseAdamW(policy, lr=lr), pair_corpus()
    batch = collate(corpus, corpus.examples[:4])
    for _ in range(steps):
        optimizer.zero_grad()
        policy.response_logps(batch).sum().backward()
        optimizer.step()
    return optimizer


def weights_of(policy):
    return {name: weight.detach().clone() for name, weight in policy.full_weights()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)


def test_the_base_holds_what_the_seed_makes_of_the_values():
    base = tiny_llama().bfloat16()
    policy, before = policy_on(base), named_weights(base)
    train(policy)
    by_chance = moved = 0
    for name, weight in weights_of(policy).items():
        expected, at = before[name].detach().clone().flatten(), policy.positions[name]
        value = policy.values[name].detach()
        expected[at.unpack()] = rounded(value, at.low, torch.bfloat16, 3)
        assert same_bits(weight, expected.view(weight.shape))
        by_chance += int((weight.view(-1)[at.unpack()] != value.bfloat16()).sum())
        moved += int((weight != before[name]).sum())
    assert by_chance > 0.1 * policy.selected and policy.changed() == moved
    after = weights_of(policy)
    policy.write_back()
    assert_same_bits(weights_of(policy), after)
    with policy.reference():
        assert_same_bits(weights_of(policy), {name: weight.detach() for name, weight in before.items()})


def test_small_steps_move_the_weights_in_the_mean():
    """By nearest nearly all of them stay; by chance the mean of the weights' changes is the mean of the values'."""
    base = tiny_llama().bfloat16()
    by_seed = {seed: policy_on(base, seed) for seed in (None, 3)}
    drift = {}
    for seed, policy in by_seed.items():
        train(policy, LOW, steps=6)
        parts = [
            (torch.stack([policy.weights[name].detach().view(-1)[at.unpack()].float(), policy.values[name].detach()]))
            - named_weights(base)[name].detach().view(-1)[at.unpack()].float()
            for name, at in policy.positions.items()
        ]
        drift[seed] = torch.cat(parts, 1)
    towards = drift[3][1].sign()
    moved, meant = (drift[3] * towards).double()
    assert by_seed[None].changed() < 0.01 * by_seed[None].selected < by_seed[3].changed()
    # Each weight is a coin: the distance to its value has the value as mean, and a variance that the sum has K times.
    assert abs(moved.sum() - meant.sum()) <= 5 * (moved - meant).square().sum().sqrt()
    assert (drift[None][0] * towards).sum() < 0.2 * meant.sum(), "what nearest keeps of it"


@pytest.mark.parametrize("steps", [1, 3])
def test_another_seed_is_another_run_and_the_same_the_same(steps):
    base = tiny_llama().bfloat16()
    found = []
    for seed in (1, 1, 2):
        train(policy := policy_on(base, seed), steps=steps)
        found.append(weights_of(policy))
    assert_same_bits(found[0], found[1])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_a_float32_base_is_the_same_whatever_is_asked_for(tmp_path):
    found = []
    for seed in (None, 3):
        policy = policy_on(tiny_llama(), seed)
        train(policy)
        policy.save_delta(tmp_path / f"{seed}")
        found.append(
            (weights_of(policy), SparseAdamW(policy).state_dict()["identity"], (tmp_path / f"{seed}").read_bytes())
        )
    assert_same_bits(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("seed", [-1, 1 << 31, True])
def test_seeds_that_the_kernels_do_not_take_are_refused_at_once(seed):
    with pytest.raises(ValueError, match="rounding_seed: expected None or an integer in 0..2147483647"):
        policy_on(tiny_llama().bfloat16(), seed)


@pytest.mark.parametrize("second_seed", [3, 4, None], ids=["same", "another", "nearest"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_stages_are_rebuilt_bit_for_bit(tmp_path, tied, second_seed):
    """One seed rounds all that a policy has, what it trains and what an earlier stage did: one delta makes it again."""
    base, paths = tiny_llama(tie_word_embeddings=tied).bfloat16(), [tmp_path / name for name in ("first", "both")]
    train(first := policy_on(base))
    first.save_delta(paths[0])
    second = policy_on(base, second_seed, Delta.load(paths[0]), selected_by=2)
    start, batch = weights_of(second), collate(pair_corpus(), pair_corpus().examples[:4])
    second.write_back()
    assert_same_bits(weights_of(second), start)
    with second.reference():
        reference = second.response_logps(batch)
    assert torch.equal(second.response_logps(batch), reference), "policy and reference begin as one"
    same = all(same_bits(start[name], weight) for name, weight in weights_of(first).items())
    assert same == (second_seed == 3), "with its seed they are what the first stage left"
    train(second)
    with second.reference():
        assert_same_bits(weights_of(second), start)
    second.save_delta(paths[1], before=paths[0])
    for path, policy in zip(paths, (first, second), strict=True):
        Delta.load(path).merge_into(rebuilt := copy.deepcopy(base))
        assert_same_bits(dict(named_weights(rebuilt)), weights_of(policy))


def test_a_models_own_state_leaves_its_values_as_they_are():
    train(policy := policy_on(tiny_llama().bfloat16()))
    values = {name: value.detach().clone() for name, value in policy.values.items()}
    policy.model.load_state_dict(policy.model.state_dict())
    assert all(torch.equal(value, values[name]) for name, value in policy.values.items())


def test_an_optimizers_state_goes_on_where_it_was_and_nowhere_else():
    base = tiny_llama().bfloat16()
    first = train(policy_on(base), steps=2)
    second = SparseAdamW(policy_on(base), lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same_bits(weights_of(first.policy), weights_of(second.policy))
    for optimizer in (first, second):
        optimizer.zero_grad()
        optimizer.step()
    assert_same_bits(weights_of(first.policy), weights_of(second.policy))
    for seed in (None, 4):
        with pytest.raises(UserError, match="not of a SparseAdamW with this base, selection and rounding_seed"):
            SparseAdamW(policy_on(base, seed)).load_state_dict(first.state_dict())


def test_killed_and_continued_is_bit_for_bit_the_same(tmp_path):
    def build(name):
        (tmp_path / name).mkdir(exist_ok=True)
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
        config = TrainConfig(learning_rate=1e-4, save_steps=2, warmup_steps=1, **settings)
        return Trainer(policy_on(tiny_llama().bfloat16()), pair_corpus(), Preference(0.5), config, tmp_path / name)

    deque((straight := build("straight")).run(), maxlen=0)
    killed = build("killed").run()
    for _ in range(3):  # one step after the checkpoint is lost
        next(killed)
    killed.close()
    deque((resumed := build("killed")).run(), maxlen=0)
    assert_same_bits(weights_of(straight.policy), weights_of(resumed.policy))
    assert all(torch.equal(value, resumed.policy.values[name]) for name, value in straight.policy.values.items())
