import copy

import pytest
import torch
from conftest import pair_corpus, random_selection, shared, tiny_llama
from safetensors.torch import load_file
from torch import nn

from allo_fast.config import UserError
from allo_fast.data.batch import collate
from allo_fast.method import optim
from allo_fast.method.group import Group
from allo_fast.method.optim import SparseAdamW
from allo_fast.method.policy import SparsePolicy
from allo_fast.model.weights import named_weights
from allo_kernels import Positions


class OneTensor:
    """What SparseAdamW needs of a policy, around a single flat weight."""

    def __init__(self, weight, positions):
        self.weights = {"w": nn.Parameter(weight, requires_grad=False)}
        self.groups = [Group.of(self.weights, [Positions.pack(positions, weight.numel())])]
        self.values = {"w": nn.Parameter(self.groups[0].values)}
        self.base = str(positions)
        self.write_back = self.check_current = lambda: None
        self.loaded_alone, self.rounding_seed = False, None


def test_reproduces_the_release():
    golden = load_file(shared("golden/masked_adamw.safetensors"))
    positions = golden["mask"].nonzero().squeeze(1)
    policy = OneTensor(golden["param.0"].clone(), positions)
    optimizer = SparseAdamW(policy, lr=3e-3, hf_eps=True)
    for step in range(1, 9):
        policy.values["w"].grad = golden[f"grad.{step}"][positions]
        optimizer.step()
        torch.testing.assert_close(policy.weights["w"].data, golden[f"param.{step}"], rtol=0, atol=3e-7)
        assert torch.equal(policy.weights["w"][golden["mask"] == 0], golden["param.0"][golden["mask"] == 0])


def test_the_two_forms_of_eps_differ():
    moved = []
    for hf_eps in (False, True):
        policy = OneTensor(torch.zeros(2), torch.tensor([0, 1]))
        policy.values["w"].grad = torch.full((2,), 1e-8)
        SparseAdamW(policy, lr=1.0, hf_eps=hf_eps).step()
        moved.append(-float(policy.weights["w"][0]))
    # m / (sqrt(v) + eps) at step 1: g / (g + eps) in the one form, g / (g + eps / sqrt(1 - b2)) in the other.
    assert moved == pytest.approx([1e-8 / 2e-8, 1e-8 / (1e-8 + 1e-8 / 0.001**0.5)], rel=1e-5)


def trained(model, steps=4, resume_at=None):
    policy = SparsePolicy(model, random_selection(model))
    optimizer = SparseAdamW(policy, lr=1e-2, weight_decay=0.1)
    corpus = pair_corpus()
    batch = collate(corpus, corpus.examples)
    losses = []
    for step in range(steps):
        if step == resume_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = SparseAdamW(policy, lr=5.0)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        loss = -policy.response_logps(batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return policy, losses


def test_equals_dense_adamw_on_the_selected_entries():
    model = tiny_llama()
    dense = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.1)
    policy = SparsePolicy(model, random_selection(model))
    corpus = pair_corpus()
    (-policy.response_logps(collate(corpus, corpus.examples)).mean()).backward()
    for name, weight in named_weights(dense).items():
        weight.grad = torch.zeros_like(weight)
        if name in policy.values:
            weight.grad.view(-1)[policy.positions[name].unpack()] = policy.values[name].grad
    SparseAdamW(policy, lr=1e-2, weight_decay=0.1).step()
    optimizer.step()
    for name, at in policy.positions.items():
        wanted = named_weights(dense)[name].view(-1)[at.unpack()]
        torch.testing.assert_close(policy.values[name].detach(), wanted, rtol=1e-6, atol=1e-7)


def test_it_learns_and_repeats_bit_for_bit():
    (first, losses), (second, again) = trained(tiny_llama(), 12), trained(tiny_llama(), 12)
    assert losses == again and losses[-1] < losses[0] - 0.1
    assert all(torch.equal(first.values[name], second.values[name]) for name in first.values)


def test_state_dict_round_trip():
    (straight, _), (resumed, _) = trained(tiny_llama()), trained(tiny_llama(), resume_at=2)
    assert all(torch.equal(straight.values[name], resumed.values[name]) for name in straight.values)


def test_state_exists_from_construction():
    policy = SparsePolicy(model := tiny_llama(), random_selection(model))
    optimizer = SparseAdamW(policy)
    assert all(optimizer.state[value]["exp_avg"].shape == value.shape for value in policy.values.values())


def test_closure():
    policy = OneTensor(torch.ones(2), torch.tensor([1]))

    def closure():
        loss = policy.values["w"].square().sum()
        loss.backward()
        return loss

    assert SparseAdamW(policy, lr=0.5).step(closure) == 1.0
    assert policy.weights["w"].tolist() == pytest.approx([1.0, 0.5])


def test_clipping_twice_is_refused():
    policy = OneTensor(torch.ones(2), torch.tensor([1]))
    with pytest.raises(ValueError, match="grad_scale: this optimizer clips by itself"):
        SparseAdamW(policy, max_grad_norm=1.0).step(grad_scale=torch.tensor(0.5))


def test_state_of_another_selection_is_refused():
    one, two = (SparseAdamW(OneTensor(torch.ones(4), torch.arange(k))) for k in (1, 2))
    with pytest.raises(UserError, match="state_dict: not of a SparseAdamW with this base, selection and rounding_seed"):
        two.load_state_dict(one.state_dict())


def test_gradients_dropped_and_made_again():
    """zero_grad of a model sets gradients to None; the next ones lie elsewhere and still count."""
    policy = OneTensor(torch.zeros(2), torch.tensor([0, 1]))
    optimizer = SparseAdamW(policy, lr=1.0)
    for gradient in (None, torch.ones(2)):
        policy.values["w"].grad = gradient
        optimizer.step()
    assert policy.weights["w"].tolist() == pytest.approx([-0.1 / 0.19 / (0.001 / 0.001999) ** 0.5] * 2, rel=1e-5)


def test_the_norm_of_many_parts(monkeypatch):
    gradients = [torch.randn(7, 3), torch.randn(2)]
    whole = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    for part in (3, 1 << 22):
        monkeypatch.setattr(optim, "_PART", part)
        torch.testing.assert_close(optim.total_norm(gradients), whole.float(), rtol=1e-7, atol=0)
