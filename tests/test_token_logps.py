import pytest
import torch
from torch.nn import functional as F

from allo_kernels import token_logps
from allo_kernels import token_logps as public


def full_logits(hidden, weight, targets, bias=None, softcap=None, temperature=1.0):
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = (logits.float() / temperature).log_softmax(-1)
    kept = targets != -100
    return torch.where(kept, logps.gather(1, targets.clamp(min=0)[:, None]).squeeze(1), 0.0)


def inputs(n, d, v, dtype, bias, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=draw) / d**0.5).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=draw).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(0, v, (n,), generator=draw)
    targets[::4] = -100
    upstream = torch.randn(n, generator=draw)  # not ones: a wrong weighting must show
    upstream[1::5] = 0.0
    return hidden, weight, bias, targets, upstream


# Rows, width and vocabulary that are no multiple of any block; 400009 words leave room for ten rows a chunk.
@pytest.mark.parametrize("n, d, v", [(1, 3, 5), (63, 17, 1000), (23, 8, 400009)])
@pytest.mark.parametrize("softcap, temperature, bias", [(None, 1.0, False), (5.0, 1.0, True), (None, 0.7, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_full_logits(n, d, v, softcap, temperature, bias, dtype):
    hidden, weight, bias, targets, upstream = inputs(n, d, v, dtype, bias)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    settings = {"softcap": softcap, "temperature": temperature}

    def run(function, cast):
        held = [None if leaf is None else cast(leaf) for leaf in (hidden, weight, bias)]
        logps = function(held[0], held[1], targets, bias=held[2], **settings)
        return [logps, *torch.autograd.grad((logps * upstream.to(logps)).sum(), leaves)]

    truth = run(full_logits, lambda leaf: leaf.double())
    for ours, torchs, exact in zip(run(public, lambda x: x), run(full_logits, lambda x: x), truth, strict=True):
        scale = exact.abs().max()
        rounding = 4 * torch.finfo(ours.dtype).eps * scale
        error, allowed = (ours - exact).abs().max(), (torchs - exact).abs().max() + rounding
        assert error <= allowed, f"{error} > {allowed}"


def test_a_frozen_weight_costs_nothing_and_zero_rows_are_skipped(monkeypatch):
    hidden, weight, _, targets, upstream = inputs(16, 4, 11, torch.float32, False)
    rows = []

    module = __import__("sys").modules["allo_kernels.token_logps"]
    original = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda found, weight: rows.append(len(found)) or original(found, weight))
    logps = token_logps(hidden, weight.detach(), targets)
    (logps * upstream).sum().backward()
    assert rows == [int((targets != -100).sum()), int(((targets != -100) & (upstream != 0)).sum())]
    assert weight.grad is None and hidden.grad is not None


def test_no_rows_at_all():
    hidden = torch.randn(3, 4, requires_grad=True)
    logps = token_logps(hidden, torch.randn(5, 4), torch.full((3,), -100))
    logps.sum().backward()
    assert torch.equal(logps, torch.zeros(3)) and torch.equal(hidden.grad, torch.zeros(3, 4))
    assert token_logps(torch.zeros(0, 4), torch.randn(5, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(5, 3)}, "hidden, weight"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets: expected shape"),
        ({"targets": torch.tensor([0, 5])}, "targets: expected -100 or 0..4, got 0..5"),
        ({"impl": "cuda"}, "impl: expected"),
    ],
)
def test_bad_arguments(change, message):
    given = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        token_logps(**given | change)


def test_triton_says_that_it_is_not_there():
    with pytest.raises(NotImplementedError, match="token_logps has no Triton kernel"):
        token_logps(torch.zeros(1, 4), torch.zeros(5, 4), torch.zeros(1, dtype=torch.int64), impl="triton")
