import pytest
import torch

from allo_kernels import gather, scatter_, swap_


def case(dtype=torch.bfloat16, index=torch.int32):
    dense = torch.arange(35, dtype=torch.float32).view(5, 7).to(dtype)
    return dense, torch.tensor([0, 3, 20, 34], dtype=index)  # both ends of the tensor


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_gather(index):
    dense, positions = case(index=index)
    assert gather(dense, positions).tolist() == [0, 3, 20, 34]
    out = torch.full((4,), float("nan"))
    gather(dense, positions, out=out)
    gather(dense, positions, out=out, accumulate=True)
    assert out.tolist() == [0, 6, 40, 68]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_scatter_rounds_to_nearest_and_touches_nothing_else(index):
    dense, positions = case(index=index)
    before = dense.clone()
    scatter_(dense, positions, torch.tensor([1.001, -2.0, 1e-9, 7.0]))
    mask = torch.zeros(35, dtype=torch.bool).index_fill(0, positions.long(), True).view(5, 7)
    assert torch.equal(dense[~mask], before[~mask])
    assert torch.equal(dense[mask], torch.tensor([1.001, -2.0, 1e-9, 7.0]).bfloat16())


def test_two_swaps_change_nothing():
    dense, positions = case()
    before, held = dense.clone(), torch.full((4,), 9.0, dtype=torch.bfloat16)
    swap_(dense, positions, held)
    assert dense.view(-1)[positions.long()].tolist() == [9.0] * 4 and held.tolist() == [0, 3, 20, 34]
    swap_(dense, positions, held)
    assert torch.equal(dense, before) and held.tolist() == [9.0] * 4


def test_nothing_selected():
    dense, none = torch.ones(3), torch.zeros(0, dtype=torch.int32)
    assert gather(dense, none).shape == (0,)
    scatter_(dense, none, torch.zeros(0))
    swap_(dense, none, torch.zeros(0))
    assert torch.equal(dense, torch.ones(3))


def test_bad_arguments():
    dense, positions = case()
    with pytest.raises(ValueError, match="dense: expected a contiguous tensor"):
        gather(dense.T, positions)
    with pytest.raises(ValueError, match="values: expected shape"):
        scatter_(dense, positions, torch.zeros(3))
    with pytest.raises(ValueError, match="values: expected torch.bfloat16"):
        swap_(dense, positions, torch.zeros(4))
    with pytest.raises(ValueError, match="out: expected shape"):
        gather(dense, positions, out=torch.zeros(3))
