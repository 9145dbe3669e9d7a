"""Scores that are made a part at a time, and what is selected of them: per tensor, the lowest, from large tensors."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from allo_fast.config import UserError
from allo_fast.method import scores
from allo_fast.method.scores import Change, Given, Random
from allo_fast.method.selection import Selection


def select(tensors, ratio, **settings) -> dict[str, list[int]]:
    chosen = Selection.from_scores(tensors, ratio, base="", **settings)
    return {name: chosen.positions(name).unpack().tolist() for name in tensors}


def highest(values: Tensor, count: int, skip: int = 0) -> list[int]:
    """By a stable sort: of equal ones the first."""
    order = values.abs().view(-1).sort(descending=True, stable=True).indices
    return sorted(order[skip : skip + count].tolist())


def ties(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


def test_parts_of_what_is_given_and_of_a_change():
    torch.manual_seed(0)
    before, after = torch.randn(6, 5).bfloat16(), torch.randn(6, 5)
    assert torch.equal(Given(before).part(3, 11), before.view(-1)[3:11].abs())
    assert torch.equal(Given(before.T).part(0, 30), before.T.reshape(-1).abs()), "flat in its own order"
    change = Change(before, after)
    assert torch.equal(change.part(7, 30), (after - before.float()).view(-1)[7:].abs())
    assert (Given(before).numel(), change.numel()) == (30, 30) and change.part(4, 4).numel() == 0


@pytest.fixture
def in_small_pieces(monkeypatch):
    """As if 7 scores were many, and 10 random ones."""
    monkeypatch.setattr(scores, "_LOOK", 7)
    monkeypatch.setattr(scores, "_DRAW", 10)


def test_random_scores_are_the_same_wherever_a_part_begins(in_small_pieces):
    whole = Random("a", 64, seed=3)
    drawn = whole.part(0, 64)
    for begin, end in ((0, 10), (0, 9), (5, 25), (10, 20), (63, 64), (20, 20), (0, 0), (64, 64)):
        assert torch.equal(whole.part(begin, end), drawn[begin:end])
    assert drawn.unique().numel() == 64 and 0 <= drawn.min() and drawn.max() < 1
    others = [Random("b", 64, 3), Random("a", 64, 4)]
    assert not any(torch.equal(other.part(0, 64), drawn) for other in others)


def test_random_scores_are_uniform():
    drawn = Random("a", 3_000_000, seed=0).part(0, 3_000_000)
    counts = torch.histc(drawn, 10, 0, 1)
    assert (counts / 300_000 - 1).abs().max() < 0.01 and not torch.equal(drawn[: 1 << 20], drawn[1 << 20 : 1 << 21])


@pytest.mark.parametrize("ratio, skip", [(0.1, 0.0), (0.35, 0.2), (0.2, 0.8), (1.0, 0.0)])
def test_large_tensors_are_looked_at_in_parts(in_small_pieces, ratio, skip):
    torch.manual_seed(0)
    tensors = {"a": ties(10, 9), "b": ties(6), "c": ties(64)}
    flat = torch.cat([tensor.view(-1) for tensor in tensors.values()])
    expected = highest(flat, int(ratio * 160), int(skip * 160))
    found = select(tensors, ratio, skip=skip)
    assert [*found["a"], *(90 + i for i in found["b"]), *(96 + i for i in found["c"])] == expected


@pytest.mark.parametrize("ratio, skip", [(0.1, 0.0), (0.3, 0.25), (0.5, 0.5)])
def test_per_tensor_every_tensor_has_its_own_fraction(in_small_pieces, ratio, skip):
    torch.manual_seed(0)
    tensors = {"a": 100 * ties(12, 5), "b": ties(20), "c": ties(3)}
    found = select(tensors, ratio, skip=skip, scope="per_tensor")
    for name, tensor in tensors.items():
        size = tensor.numel()
        assert found[name] == highest(tensor, int(ratio * size), int(skip * size)), name
    left = select(tensors, ratio, scope="per_tensor", exclude=("a",))
    assert left["a"] == [] and left["b"] == highest(tensors["b"], int(ratio * 20))
    with pytest.raises(UserError, match="nothing is selected: ratio 0.01 of 83 weights"):
        select(tensors, 0.01, scope="per_tensor")
    with pytest.raises(ValueError, match="scope: expected 'global' or 'per_tensor', got 'layer'"):
        select(tensors, 0.1, scope="layer")


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_the_last_are_what_the_top_leaves(in_small_pieces, scope, caplog):
    torch.manual_seed(0)
    tensors = {"a": ties(40), "b": ties(60)}
    top, last = select(tensors, 0.8, scope=scope), select(tensors, 0.2, scope=scope, last=True)
    for name, tensor in tensors.items():
        assert sorted(top[name] + last[name]) == list(range(tensor.numel()))
    band = select(tensors, 0.2, scope=scope, last=True, skip=0.1)
    wider = select(tensors, 0.3, scope=scope, last=True)
    lowest = select(tensors, 0.1, scope=scope, last=True)
    assert all(sorted(band[name] + lowest[name]) == wider[name] for name in tensors), "the lowest are passed over"
    assert not caplog.text, "zeros among the last are no surprise"


@dataclass
class Watched:
    """Scores that remember how often they were made."""

    tensor: Tensor
    looks: list = field(default_factory=list)

    def numel(self) -> int:
        return self.tensor.numel()

    def part(self, begin: int, end: int) -> Tensor:
        self.looks.append((begin, end))
        return self.tensor[begin:end].abs()


def test_scores_are_made_no_more_often_than_they_are_needed(in_small_pieces):
    looks = {}
    for skip in (0.0, 0.2):
        watched = Watched(torch.randn(20))
        select({"a": watched}, 0.1, skip=skip)
        looks[skip] = watched.looks
        assert {end - begin for begin, end in watched.looks} == {7, 6} and set(watched.looks) == {
            (0, 7),
            (7, 14),
            (14, 20),
        }
    digits, ties, choice = 4, 1, 1  # of 8 bits each
    assert len(looks[0.0]) / 3 == digits + ties + choice and len(looks[0.2]) == 2 * len(looks[0.0])
