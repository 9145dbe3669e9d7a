import pytest
import torch

from allo_kernels import topk_threshold
from tests.conftest import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 500, 1999, 2000])
def test_threshold_is_that_of_a_full_sort(dtype, k):
    draw = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-30, 30, (2000,), generator=draw) if dtype != torch.float16 else 1e-3
    scores = (torch.randn(2000, generator=draw) * scale).to(dtype)
    scores[::10] = 0.0
    scores[1::10] = scores[1]  # many ties
    chunks = [scores[:700].view(70, 10), scores[700:701], scores[701:]]
    expected = scores.float().abs().sort(descending=True).values[k - 1]
    found = topk_threshold(chunks, k)
    assert found.value.item() == expected.item()
    assert found.above == (scores.float().abs() > expected).sum() and found.ties == (scores.abs() == expected).sum()


def test_extremes():
    assert topk_threshold([torch.tensor([0.0, -0.0])], 2) == (0, 0, 2)
    assert topk_threshold([torch.tensor([float("inf"), 1e-45, -1.0])], 3).value.item() == torch.tensor(1e-45).item()
    assert topk_threshold([torch.tensor([float("inf"), 1.0])], 1) == (float("inf"), 0, 1)


class Counted(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_bits_that_no_score_has_take_no_pass():
    half, full = [torch.bfloat16, torch.float16], [torch.bfloat16, torch.float32]
    for dtypes, passes in (([torch.bfloat16] * 2, 2), (half, 3), (full, 4)):
        chunks = Counted(torch.ones(2, dtype=dtype) for dtype in dtypes)
        assert topk_threshold(chunks, 2) == (1.0, 0, 4)
        assert chunks.passes - 1 == passes  # one to see that it is no generator


def test_the_host_waits_once_a_pass(monkeypatch):
    reads, read = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(1) or read(tensor))
    assert topk_threshold(torch.ones(50).bfloat16().split(7), 2) == (1.0, 0, 50)
    assert len(reads) == 2


def test_a_program_takes_many_turns(monkeypatch):
    from allo_kernels import topk_triton  # imports Triton

    monkeypatch.setattr(topk_triton, "_SCORES", 64)
    scores = torch.randn(700, device=DEVICE)  # eleven turns of eight programs
    assert topk_threshold([scores], 70, impl="triton") == topk_threshold([scores], 70)


@pytest.mark.parametrize("dtype, passes", [(torch.float32, 4), (torch.float16, 3), (torch.bfloat16, 2)])
def test_a_process_without_scores_adds_up_as_often_as_the_others(dtype, passes):
    """Each adds its counts to all others'; one that stopped a digit earlier would leave them waiting."""
    scores, others = torch.randn(100).to(dtype), []
    expected = topk_threshold([scores], 7, add_up=lambda total: others.append(total) or total)
    waiting = iter(others)
    assert topk_threshold([], 7, add_up=lambda total: total + next(waiting)) == expected
    assert len(others) == passes and next(waiting, None) is None


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_bad_scores(impl):
    nan = float("nan")
    for message, chunks in (
        ("score_chunks: 2 scores are NaN", [torch.tensor(each, device=DEVICE) for each in ([1.0, nan], [-nan])]),
        ("score_chunks: expected torch.bfloat16 or", [torch.ones(2, dtype=torch.double)]),
        ("score_chunks: expected something that can be iterated again", (torch.ones(2) for _ in range(2))),
    ):
        with pytest.raises(ValueError, match=message):
            topk_threshold(chunks, 1, impl=impl)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k: expected 1..3, got {k}"):
        topk_threshold([torch.ones(3)], k)
    with pytest.raises(ValueError, match="k: expected 1..0, got 1"):
        topk_threshold([], 1)
