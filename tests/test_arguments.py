"""What every operation makes of unusual arguments: strides, dtypes of scalars, emptiness, infinities, a graph capture.

All run with both implementations, on a GPU where there is one, else in Triton's interpreter.
"""

import re

import pytest
import torch
from torch import Tensor

from allo_kernels import (
    Positions,
    gather,
    key_token_dpo_loss,
    masked_adamw_,
    scatter_,
    swap_,
    token_logps,
    topk_threshold,
)
from allo_kernels.positions import SPAN
from allo_kernels.tools.check import drawing
from tests.conftest import DEVICE

IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])
DIFFERENTIABLE = {"hidden", "weight", "bias", "chosen_logps", "rejected_logps"}
WRITTEN = {
    "gather": ["out"],
    "scatter_": ["dense"],
    "swap_": ["dense", "values"],
    "scatter_ of many": ["dense"],
    "scatter_ by chance": ["dense"],
    "masked_adamw_": ["values", "exp_avg", "exp_avg_sq", "weight"],
}


def positions(*indices: int, size: int = 35) -> Positions:
    return Positions.pack(torch.tensor(indices, device=DEVICE, dtype=torch.int64), size)


def operations() -> dict[str, tuple]:
    """Every operation with every tensor that it takes."""
    random, at = drawing(DEVICE), positions(0, 3, 20, 34)
    pair = {f"{ref}{side}_logps": random(3, 7) for ref in ("", "ref_") for side in ("chosen", "rejected")}
    masks = {f"{side}_valid": random(3, 7) > -1 for side in ("chosen", "rejected")}
    head = {"hidden": random(6, 5), "weight": random(7, 5), "bias": random(7)}
    head |= {"targets": torch.tensor([0, 6, -100, 2, 3, 1], device=DEVICE), "softcap": 3.0, "temperature": 0.7}
    state = {"values": random(4), "grad": random(4), "exp_avg": random(4), "exp_avg_sq": random(4).abs()}
    settings = {"step": 2, "lr": 0.5, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    by_chance = {"dense": random(5, 7, dtype=torch.bfloat16), "rounding_seed": 3}
    many = {"dense": [random(5, 7), random(5, 7)], "positions": Positions.cat([at, at]), "values": random(8)}
    return {
        "gather": (gather, {"dense": random(5, 7), "positions": at, "out": random(4), "accumulate": True}),
        "scatter_": (scatter_, {"dense": random(5, 7), "positions": at, "values": random(4)}),
        "swap_": (swap_, {"dense": random(5, 7), "positions": at, "values": random(4)}),
        "scatter_ of many": (scatter_, many),
        "scatter_ by chance": (scatter_, {**by_chance, "positions": at, "values": random(4)}),
        "masked_adamw_": (masked_adamw_, {**state, **settings, "weight": random(5, 7), "positions": at}),
        "token_logps": (token_logps, head),
        "token_logps, compact": (token_logps, {**head, "positions": at, "values": random(4)}),
        "topk_threshold": (topk_threshold, {"score_chunks": [random(10, 7), random(70)], "k": 30}),
        "key_token_dpo_loss": (key_token_dpo_loss, {**pair, **masks, "fraction": 0.5, "beta": 0.3}),
    }


def tensors(value) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [tensor for tensor in values if isinstance(tensor, Tensor)]


def run(name: str, impl: str, argument: str = "", change=lambda tensor: tensor) -> list[Tensor]:
    """All outputs, gradients and arguments afterwards, of the operation with one argument changed."""
    function, given = operations()[name]
    if argument in given:
        value = given[argument]
        given[argument] = [change(part) for part in value] if isinstance(value, list) else change(value)
    leaves = [given[key].requires_grad_() for key in given if key in DIFFERENTIABLE and name not in WRITTEN]
    result = function(**given, impl=impl)
    found = tensors(result)
    if leaves:
        upstream = drawing(DEVICE, seed=3)(*found[0].shape)
        upstream = change(upstream) if argument == "upstream" else upstream
        found += [d for d in torch.autograd.grad(found[0], leaves, upstream, allow_unused=True) if d is not None]
    return [tensor.detach() for tensor in (*found, *(t for value in given.values() for t in tensors(value)))]


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers, with others between them that must not be read."""
    other = torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else torch.zeros_like(tensor)
    return torch.stack([tensor, tensor.logical_not() if tensor.dtype == torch.bool else other], -1)[..., 0]


def repeated(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


def across(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim == 2 else with_gaps(tensor)


def arguments() -> list[tuple[str, str]]:
    found = []
    for name, (_, given) in operations().items():
        found += [(name, key) for key, value in given.items() if any(tensor.ndim for tensor in tensors(value))]
        found += [(name, "upstream")] if name.startswith("token_logps") or name == "key_token_dpo_loss" else []
    return found


@pytest.mark.parametrize("view", [with_gaps, repeated, across])
@pytest.mark.parametrize("name, argument", arguments())
def test_strides_are_respected_or_refused(name, argument, view):
    outcomes = []
    for impl in ("torch", "triton"):
        try:
            strided = run(name, impl, argument, view)
        except ValueError as error:
            assert f"{argument}: expected a contiguous tensor" in str(error)
            outcomes.append("refused")
            continue
        outcomes.append("right")
        for ours, plain in zip(strided, run(name, impl, argument, lambda x: view(x).contiguous()), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)  # strides may change the order of a sum
    assert outcomes[0] == outcomes[1]


def test_positions_are_contiguous_and_in_one_place():
    at = positions(0, 3, 20, 34)
    for message, low, starts in (
        ("low: expected a contiguous tensor", with_gaps(at.low.int()).to(torch.uint16)[::2], at.starts),
        ("starts: expected a contiguous tensor", at.low, torch.zeros(4, dtype=torch.int64, device=DEVICE)[::2]),
        ("starts: expected a tensor on", at.low, at.starts.to("meta")),
        ("starts: expected torch.int64", at.low, at.starts.int()),
    ):
        with pytest.raises(ValueError, match=message):
            Positions(low, starts, (35,), (4,))


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("argument", ["step", "lr", "eps", "grad_scale"])
def test_device_scalars_of_any_dtype(argument, dtype, impl):
    def result(number):
        function, given = operations()["masked_adamw_"]
        function(**given | {argument: number}, impl=impl)
        return given["values"]

    assert torch.allclose(result(torch.tensor(2, dtype=dtype, device=DEVICE)), result(2), rtol=1e-6)


@IMPLS
@pytest.mark.parametrize(
    "change, message",
    [({"step": 0}, "step: expected a finite number >= 1, got 0"), ({"lr": -1.0}, "lr: expected a finite number >= 0")]
    + [({"eps": float("nan")}, "eps: expected a finite number >= 0, got nan")]
    + [({"weight_decay": float("inf")}, "weight_decay: expected a finite number >= 0, got inf")]
    + [({"beta1": 1.0}, "beta1: expected a number below 1"), ({"beta2": -0.1}, "beta2: expected a finite number >= 0")]
    + [({"lr": torch.tensor(True, device=DEVICE)}, "lr: expected torch.bfloat16 or .*, got torch.bool")],
)
def test_numbers_that_make_no_step(change, message, impl):
    function, given = operations()["masked_adamw_"]
    with pytest.raises(ValueError, match=message):
        function(**given | change, impl=impl)


@IMPLS
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_has_a_new_version(name, impl):
    function, given = operations()[name]
    written = [tensor for key in WRITTEN[name] for tensor in tensors(given[key])]
    before = [tensor._version for tensor in written]
    function(**given, impl=impl)
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))


# What a graph can hold: kernels that read their scalars on the device, once the table of addresses is there.
@IMPLS
@pytest.mark.parametrize("name", operations())
def test_while_a_graph_is_captured(name, impl, monkeypatch):
    function, given = operations()[name]
    capturable = name == "key_token_dpo_loss" or impl == "triton" and name in WRITTEN
    leaf = {"hidden": given["hidden"].requires_grad_()} if "hidden" in given else {}
    backward = [function(**given | leaf, impl=impl)] if leaf else []
    if name == "scatter_ of many" and impl == "triton":
        function(**given, impl=impl)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if capturable:
        function(**given, impl=impl)
    else:
        before = [tensor.clone() for value in given.values() for tensor in tensors(value)]
        with pytest.raises(RuntimeError, match="waits for the host: it cannot be captured in a CUDA graph"):
            function(**given, impl=impl)
        after = [tensor for value in given.values() for tensor in tensors(value)]
        assert all(map(torch.equal, before, after)), "a half-done update would be worse than none"
    for logps in backward:
        with pytest.raises(RuntimeError, match="backward of token_logps, without gradient_rows, waits for the host"):
            logps.sum().backward()


def test_the_first_call_for_a_list_of_weights_is_not_captured(monkeypatch):
    function, given = operations()["scatter_ of many"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="the first call for these weights, which makes the table"):
        function(**given, impl="triton")
    with pytest.raises(RuntimeError, match="Positions.pack waits for the host"):
        positions(0)


@IMPLS
def test_another_dtype_at_the_same_address(impl):
    """As when one model's memory is freed and another's weights come to lie there: the blocks lie elsewhere."""
    size = 2 * SPAN + 5
    full, at = torch.zeros(size, device=DEVICE), positions(0, SPAN + 1, 2 * SPAN + 4, size=size)
    half = full.view(torch.bfloat16)[:size]
    assert half.data_ptr() == full.data_ptr()
    for dense in (full, half, full):
        full.zero_()
        scatter_([dense], at, torch.tensor([1.0, 2.0, 3.0], device=DEVICE), impl=impl)
        assert dense[at.unpack()].tolist() == [1, 2, 3] and full.view(torch.int16).count_nonzero() == 3


@IMPLS
def test_other_weights_for_the_same_positions(impl):
    at = Positions.cat([positions(1), positions(2)])
    one, two = (torch.zeros(35, device=DEVICE) for _ in range(2))
    for dense in ([one, two], [two, one]):
        scatter_(dense, at, torch.tensor([1.0, 2.0], device=DEVICE), impl=impl)
        assert dense[0][1] == 1 and dense[1][2] == 2


@IMPLS
def test_nothing_at_all(impl):
    empty, none = torch.zeros(0, device=DEVICE), positions(size=0)
    assert gather(empty, none, impl=impl).shape == (0,)
    state = [torch.zeros(0, device=DEVICE) for _ in range(4)]
    masked_adamw_(*state, step=1, lr=0.1, beta1=0.9, beta2=0.9, eps=0.1, weight_decay=0.0, impl=impl)
    assert topk_threshold([empty, torch.ones((), device=DEVICE), empty], 1, impl=impl) == (1, 0, 1)
    for rows, length in ((0, 5), (2, 0)):
        zeros, valid = torch.zeros(rows, length, device=DEVICE), torch.ones(rows, length, device=DEVICE).bool()
        leaves = [zeros.clone().requires_grad_() for _ in range(2)]
        found = key_token_dpo_loss(*leaves, zeros, zeros, valid, valid, fraction=0.5, beta=1.0, impl=impl)
        assert torch.allclose(found[0], torch.full((rows,), 2.0, device=DEVICE).log())
        assert torch.autograd.grad(found[0].sum(), leaves)[0].shape == (rows, length)


@IMPLS
def test_a_head_without_width(impl):
    leaves = [torch.zeros(size, 0, device=DEVICE).requires_grad_() for size in (3, 5)]
    logps = token_logps(*leaves, torch.tensor([0, 4, -100], device=DEVICE), impl=impl)
    assert torch.allclose(logps, torch.tensor([1 / 5, 1 / 5, 1.0], device=DEVICE).log())
    assert [d.shape for d in torch.autograd.grad(logps.sum(), leaves)] == [(3, 0), (5, 0)]


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_is_not_finite_is_so_in_both(number, softcap):
    """A word's logit of one row; the other rows stay finite."""
    random, found = drawing(DEVICE), []
    weight, bias, targets = random(40, 8), random(40), torch.arange(3, device=DEVICE) * 19
    hidden = random(3, 8)
    bias[19] = number
    hidden[2] = number
    for impl in ("torch", "triton"):
        leaf = hidden.clone().requires_grad_()
        logps = token_logps(leaf, weight, targets, bias=bias, softcap=softcap, impl=impl)
        found.append([logps.detach(), *torch.autograd.grad(logps.sum(), leaf)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["softcap", "temperature"])
@pytest.mark.parametrize("number", [0.0, -1.0, 1e-40, 1e39, torch.inf, torch.nan])
def test_caps_and_temperatures_that_fp32_cannot_hold(name, number):
    zeros = torch.zeros(2, 4)
    message = f"{name}: expected a positive number that fp32 can hold, got {number}"
    with pytest.raises(ValueError, match=re.escape(message)):
        token_logps(zeros, zeros, torch.zeros(2, dtype=torch.int64), **{name: number})


def test_nan_stays_nan_in_sixteen_bits():
    """Also one with all bits set, which rounding up would carry over into its sign."""
    dense, at = torch.zeros(35, dtype=torch.bfloat16, device=DEVICE), positions(0, 1)
    values = torch.tensor([-1, 2**31 - 1], dtype=torch.int32, device=DEVICE).view(torch.float32)
    scatter_(dense, at, values, impl="triton")
    assert dense[:2].isnan().all()
