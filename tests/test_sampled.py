"""Gradients of linear layers at selected entries alone."""

import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama

from allo_fast.data.batch import collate
from allo_fast.method import policy as policies
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.sampled import SampledLinear, pays, sampled_product
from allo_kernels import Positions


@pytest.mark.parametrize("rows", [1, 127, 300])
def test_a_sampled_product_is_the_whole_one_s_entries(rows):
    """Among them the first and the last, several in a row of the matrix, and rows without any."""
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, 9, generator=draw), torch.randn(rows, 7, generator=draw)
    flat = torch.tensor([0, 1, 6, 20, 48, 49, 62])
    found = sampled_product(left, right, Positions.pack(flat, 63))
    whole = (left.double().T @ right.double()).view(-1)[flat]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), whole, rtol=1e-5, atol=1e-5)


def test_where_entries_alone_are_less_work():
    size = 256 * 256
    few, many = (Positions.pack(torch.arange(0, size, step), size) for step in (10, 2))
    assert pays(torch.zeros(256, 256), few) and not pays(torch.zeros(256, 256), many)
    assert not pays(torch.zeros(256, 256, dtype=torch.bfloat16), few) and not pays(torch.zeros(size), few)
    assert not pays(torch.zeros(256, 256, device="meta"), few)
    assert not pays(torch.zeros(10, 10), Positions.pack(torch.tensor([3]), 100))


@pytest.mark.parametrize("bias", [False, True])
def test_the_policy_s_gradients_are_those_of_whole_products(monkeypatch, bias):
    gradients, calls = [], []
    apply = SampledLinear.apply
    monkeypatch.setattr(SampledLinear, "apply", lambda *given: calls.append(1) or apply(*given))
    for sampled in (True, False):
        monkeypatch.setattr(policies, "pays", lambda weight, at, chosen=sampled: chosen)
        model, corpus = tiny_llama(attention_bias=bias), pair_corpus()
        policy = SparsePolicy(model, random_selection(model, 0.1))
        for _ in range(2):  # the second adds to the first
            logps = policy.response_logps(collate(corpus, corpus.examples, policy.logps.layout))
            (logps * torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients.append(torch.cat([value.grad for value in policy.values.values()]))
        assert bool(calls) == sampled
        calls.clear()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_whole_product_is_taken(monkeypatch):
    monkeypatch.setattr(policies, "pays", lambda weight, at: True)
    model, corpus = tiny_llama(), pair_corpus()
    policy = SparsePolicy(model, random_selection(model, 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        policy.response_logps(collate(corpus, corpus.examples, policy.logps.layout)).sum().backward()
    assert all(value.grad.isfinite().all() for value in policy.values.values())
