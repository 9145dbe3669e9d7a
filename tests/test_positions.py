import pytest
import torch

from allo_kernels import Positions
from allo_kernels.positions import SPAN


@pytest.mark.parametrize("size", [1, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN + 5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pack_and_unpack(size, dtype):
    indices = torch.tensor(sorted({0, size // 2, size - 1, min(SPAN, size - 1)}), dtype=dtype)
    packed = Positions.pack(indices, size)
    assert packed.unpack().tolist() == indices.tolist() and len(packed) == len(indices)
    assert packed.blocks == -(-size // SPAN) and packed.nbytes == 2 * len(packed) + 8 * (packed.blocks + 1)


def test_the_end_of_the_largest_int32_tensor():
    indices = torch.tensor([0, 2**31 - 1], dtype=torch.int32)
    assert Positions.pack(indices, 2**31).unpack().tolist() == [0, 2**31 - 1]
    assert Positions.pack(indices, 2**33).unpack().tolist() == [0, 2**31 - 1]


def test_everything_and_nothing():
    assert torch.equal(Positions.pack(torch.arange(SPAN + 3), SPAN + 3).unpack(), torch.arange(SPAN + 3))
    assert len(Positions.pack(torch.empty(0).long(), 5)) == len(Positions.pack(torch.empty(0).long(), 0)) == 0


def test_many_tensors_and_each_again():
    parts = [(torch.tensor([0, 7]), 8), (torch.empty(0).long(), 0), (torch.tensor([1, SPAN, SPAN + 1]), 2 * SPAN)]
    joined = Positions.cat([Positions.pack(*part) for part in parts])
    assert joined.sizes == (8, 0, 2 * SPAN) and joined.counts == (2, 0, 3) and joined.blocks == 3
    for part, (indices, size) in zip(joined.parts, parts, strict=True):
        assert part.unpack().tolist() == indices.tolist() and part.sizes == (size,)
        assert part.low.untyped_storage().data_ptr() == joined.low.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "indices, message",
    [
        (torch.tensor([1.0]), "indices: expected torch.int32 or torch.int64"),
        (torch.tensor([[1]]), "indices: expected one dimension"),
        (torch.tensor([2, 1]), "indices: expected 0..9, got 2..1"),
        (torch.tensor([0, 2, 1, 3]), "indices: expected sorted positions without duplicates"),
        (torch.tensor([1, 1]), "indices: expected sorted positions without duplicates"),
        (torch.tensor([-1, 1]), "indices: expected 0..9, got -1..1"),
        (torch.tensor([1, 10]), "indices: expected 0..9, got 1..10"),
    ],
)
def test_bad_indices(indices, message):
    with pytest.raises(ValueError, match=message):
        Positions.pack(indices, 10)


def test_what_comes_from_a_file_is_checked():
    good = Positions.pack(torch.tensor([3, SPAN, SPAN + 9]), SPAN + 10)
    assert Positions.checked(good.low, good.starts, SPAN + 10).unpack().tolist() == [3, SPAN, SPAN + 9]
    for starts in ([0, 1], [0, 1, 2], [1, 2, 3], [0, 4, 3], [0, -1, 3]):
        with pytest.raises(ValueError, match="starts: they do not divide 3 positions"):
            Positions.checked(good.low, torch.tensor(starts), SPAN + 10)
    with pytest.raises(ValueError, match="indices: expected 0.."):
        Positions.checked(good.low, good.starts, SPAN + 9)
    with pytest.raises(ValueError, match="sorted"):
        Positions.checked(good.low[[0, 2, 1]], good.starts, SPAN + 10)
    for low, starts, size in (
        (good.low[None], good.starts, 9),
        (good.low, good.starts[0], 9),
        (good.low, good.starts, "9"),
    ):
        with pytest.raises(ValueError, match="low, starts, size: expected"):
            Positions.checked(low, starts, size)
    with pytest.raises(ValueError, match="parts: expected at least one"):
        Positions.cat([])
    with pytest.raises(ValueError, match="low: expected torch.uint16"):
        Positions.checked(good.low.to(torch.int32), good.starts, SPAN + 10)
