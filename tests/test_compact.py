import pytest
import torch

from allo_kernels import Positions, gather, scatter_, swap_
from tests.conftest import DEVICE


def case(dtype=torch.bfloat16, device="cpu"):
    dense = torch.arange(35, dtype=torch.float32).view(5, 7).to(device, dtype)
    return dense, Positions.pack(torch.tensor([0, 3, 20, 34], device=device), 35)  # both ends of the tensor


def test_gather():
    dense, positions = case()
    assert gather(dense, positions).tolist() == [0, 3, 20, 34]
    out = torch.full((4,), float("nan"))
    assert gather(dense, positions, out=out) is out
    gather(dense, positions, out=out, accumulate=True)
    assert out.tolist() == [0, 6, 40, 68]


def test_scatter_rounds_to_nearest_and_touches_nothing_else():
    dense, positions = case()
    before = dense.clone()
    scatter_(dense, positions, torch.tensor([1.001, -2.0, 1e-9, 7.0]))
    mask = torch.zeros(35, dtype=torch.bool).index_fill(0, positions.unpack(), True).view(5, 7)
    assert torch.equal(dense[~mask], before[~mask])
    assert torch.equal(dense[mask], torch.tensor([1.001, -2.0, 1e-9, 7.0]).bfloat16())


def test_two_swaps_change_nothing():
    dense, positions = case()
    before, held = dense.clone(), torch.full((4,), 9.0, dtype=torch.bfloat16)
    swap_(dense, positions, held)
    assert dense.view(-1)[positions.unpack()].tolist() == [9.0] * 4 and held.tolist() == [0, 3, 20, 34]
    swap_(dense, positions, held)
    assert torch.equal(dense, before) and held.tolist() == [9.0] * 4


def test_many_tensors_at_once():
    (first, at), second = case(), torch.zeros(70_000, dtype=torch.bfloat16)
    both = Positions.cat([at, Positions.pack(torch.tensor([69_999]), 70_000)])
    scatter_([first, second], both, torch.arange(1.0, 6.0))
    assert first.view(-1)[at.unpack()].tolist() == [1, 2, 3, 4] and second[-1] == 5 and second.count_nonzero() == 1


def test_nothing_selected():
    dense, none = torch.ones(3), Positions.pack(torch.empty(0).long(), 3)
    assert gather(dense, none).shape == (0,)
    scatter_(dense, none, torch.zeros(0))
    swap_(dense, none, torch.zeros(0))
    assert torch.equal(dense, torch.ones(3))


def test_under_deterministic_algorithms():
    dense, positions = case()
    torch.use_deterministic_algorithms(True)
    try:
        scatter_(dense, positions, torch.zeros(4))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_bad_arguments(impl):
    dense, positions = case()
    four, meta = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(5, 7, device="meta")
    for message, function, *arguments in (
        ("dense: expected a contiguous tensor", gather, dense.T, positions),
        ("dense: expected .* weights, got", gather, dense[:4], positions),
        ("dense: expected one tensor, got list", gather, [dense], positions),
        ("dense: expected .* or torch.float32, got torch.int64", gather, dense.long(), positions),
        ("dense: expected a tensor on cpu, got one on meta", gather, meta, positions),
        ("positions: expected Positions", gather, dense, torch.tensor([1, 2])),
        ("values: expected shape", scatter_, dense, positions, torch.zeros(3)),
        ("values: expected a contiguous tensor", scatter_, dense, positions, torch.zeros(8)[::2]),
        ("dense: expected torch.bfloat16, got", scatter_, [dense, dense.float()], Positions.cat([positions] * 2), four),
        ("values: expected torch.bfloat16", swap_, dense, positions, torch.zeros(4)),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments, impl=impl)
    for message, settings in (
        ("out: expected shape", {"out": torch.zeros(3)}),
        ("out: expected a tensor to accumulate into", {"accumulate": True}),
    ):
        with pytest.raises(ValueError, match=message):
            gather(dense, positions, impl=impl, **settings)
    assert torch.equal(dense, case()[0])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_autograd_sees_what_is_written(impl):
    dense, positions = case(torch.float32, DEVICE)
    factor = torch.ones(5, 7, requires_grad=True, device=DEVICE)
    product = (dense * factor).sum()
    scatter_(dense, positions, torch.zeros(4, device=DEVICE), impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    assert not gather(factor, positions, impl=impl).requires_grad
