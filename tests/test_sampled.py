"""Gradients of linear layers and embeddings at selected entries alone."""

import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama
from torch import nn

from allo_fast.data.batch import collate
from allo_fast.method import sampled as sampling
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.rows import RowLinear
from allo_fast.method.sampled import (
    Pattern,
    SampledEmbedding,
    SampledLinear,
    add_product,
    is_plain_embedding,
    is_plain_linear,
    pays,
)
from allo_kernels import Positions

FLAT = torch.tensor([0, 1, 6, 20, 48, 49, 62])  # of [9, 7]: first and last, several in a row, rows without any
PATTERN = Pattern.of(Positions.pack(FLAT, 63), torch.Size((9, 7)))


@pytest.mark.parametrize("rows", [1, 127, 300])
def test_a_product_at_entries_is_the_whole_one_s_and_adds_up(rows):
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, 9, generator=draw), torch.randn(rows, 7, generator=draw)
    add_product(left, right, PATTERN, found := torch.ones(len(FLAT)))
    whole = (left.double().T @ right.double()).view(-1)[FLAT] + 1
    torch.testing.assert_close(found.double(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 2])
def test_a_sampled_embedding_is_the_whole_one_s_entries(padding, dtype):
    """Of tokens that come twice, that select nothing, that are padding."""
    layer = nn.Embedding(9, 7, padding_idx=padding, dtype=dtype)
    tokens, draw = torch.tensor([[0, 2, 8], [0, 4, 6]]), torch.Generator().manual_seed(0)
    upstream = torch.randn(2, 3, 7, generator=draw).to(dtype)
    values = layer.weight.detach().view(-1)[FLAT].float().requires_grad_()
    output = SampledEmbedding.apply(tokens, values, layer.weight.detach(), padding, PATTERN, lambda: None)
    assert torch.equal(output, layer(tokens))
    output.backward(upstream)
    layer(tokens).backward(upstream)
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(values.grad, layer.weight.grad.view(-1)[FLAT].float(), rtol=tolerance, atol=tolerance)
    assert values.grad.count_nonzero() == (3 if padding is None else 2) + 3


def test_where_entries_alone_are_less_work():
    def asked(module: nn.Module, step: int) -> bool:
        size = module.weight.numel()
        return pays(module, module.weight, Positions.pack(torch.arange(0, size, step), size))

    assert asked(nn.Linear(256, 256), 10) and asked(nn.Embedding(256, 256), 10)
    assert not asked(nn.Linear(256, 256), 2) and not asked(nn.Embedding(256, 256), 2)
    assert not asked(nn.Linear(256, 256, dtype=torch.bfloat16), 10)
    assert asked(nn.Embedding(256, 256, dtype=torch.bfloat16), 10)
    assert not asked(nn.Embedding(256, 256, max_norm=1.0), 10)
    assert not asked(nn.Embedding(256, 256, scale_grad_by_freq=True), 10)
    assert not asked(nn.LayerNorm(1 << 16), 10)
    assert not asked(nn.Linear(256, 256, device="meta"), 10)
    assert not asked(nn.Linear(10, 10), 10)


@pytest.mark.parametrize("adds, small", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_policy_s_gradients_are_those_of_whole_products(monkeypatch, bias, adds, small):
    monkeypatch.setattr(sampling, "is_small", lambda _: small)
    gradients, calls = [], []
    for function in (SampledLinear, SampledEmbedding):
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda *given, a=apply, f=function: calls.append(f) or a(*given))
    for sampled in (True, False):
        monkeypatch.setattr(sampling, "pays", lambda module, *_, chosen=sampled: chosen and is_plain(module))
        model, corpus = tiny_llama(attention_bias=bias), pair_corpus()
        policy = SparsePolicy(model, random_selection(model, 0.1))
        policy.adds_gradients = adds
        for _ in range(2):  # the second adds to the first
            logps = policy.response_logps(collate(corpus, corpus.examples, policy.logps.layout))
            (logps * torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients.append(torch.cat([value.grad for value in policy.values.values()]))
        assert set(calls) == ({SampledLinear, SampledEmbedding} if sampled else set())
        calls.clear()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_whole_product_is_taken(monkeypatch):
    monkeypatch.setattr(sampling, "pays", lambda module, *_: is_plain(module))
    model, corpus = tiny_llama(), pair_corpus()
    policy = SparsePolicy(model, random_selection(model, 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        policy.response_logps(collate(corpus, corpus.examples, policy.logps.layout)).sum().backward()
    assert all(value.grad.isfinite().all() for value in policy.values.values())


@pytest.mark.parametrize("function", [SampledLinear, RowLinear])
def test_a_vector_is_one_row(function):
    weight, told = torch.randn(9, 7), (PATTERN, lambda: None) if function is SampledLinear else (torch.arange(9),)
    values = torch.zeros(len(FLAT) if function is SampledLinear else 63, requires_grad=True)
    function.apply(torch.ones(7), values, weight, None, *told).sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


@pytest.mark.parametrize("tied", [False, True])
def test_patterns_are_among_the_bytes_of_positions(monkeypatch, tied):
    """One for every layer that computes with its own; the head's log-probabilities know another way."""
    model = tiny_llama(tie_word_embeddings=tied)
    selection = random_selection(model, 0.1)
    plain = SparsePolicy(tiny_llama(tie_word_embeddings=tied), selection).state_bytes()["positions"]
    monkeypatch.setattr(sampling, "pays", lambda module, *_: is_plain(module))
    policy = SparsePolicy(model, selection)
    rows = {
        name: weight.shape[0] + 1
        for name, weight in policy.weights.items()
        if weight.ndim == 2 and name != "lm_head.weight"
    }
    entries = sum(len(policy.positions[name]) for name in rows)
    assert policy.state_bytes()["positions"] == plain + 4 * (entries + sum(rows.values()))


def is_plain(module: nn.Module) -> bool:
    return is_plain_linear(module) or is_plain_embedding(module)
