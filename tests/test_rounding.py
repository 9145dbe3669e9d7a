"""Rounding to bfloat16 by chance: unbiased, the same bits from every implementation, and only where it is asked for."""

import pytest
import torch

from allo_kernels import Positions, masked_adamw_, rounding, scatter_
from allo_kernels.positions import SPAN
from allo_kernels.rounding import LARGEST, rounded, stochastically
from allo_kernels.tools.check import drawing, selected
from tests.conftest import DEVICE

IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])
SETTINGS = {"step": 2, "lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
BASE = 0x3F9A0000  # 1.203125, which bf16 holds


def as_float(bits):
    """fp32 of these bits, which may be written as unsigned."""
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def as_bits(number):
    return number.float().view(torch.int32).long() & 0xFFFFFFFF


def away_from_zero(value, low, seed):
    """1 where the neighbour farther from zero was chosen, 0 where the nearer one; nothing else may be."""
    away = (as_bits(stochastically(value, low, seed)) - (as_bits(value) & 0xFFFF0000)) >> 16
    assert ((away == 0) | (away == 1)).all()
    return away.double()


# A share of the way to the next bf16, over all entries of a block and over seeds in a row; and all shares at one entry,
# as of a weight that grows by less than bf16 can show. Each sum is one of coins, allowed five standard deviations.
@pytest.mark.parametrize("sign", [0, 1 << 31], ids=["positive", "negative"])
@pytest.mark.parametrize(
    "over, share",
    [(over, share) for over in ("entries", "seeds") for share in (1, 0x1234, 0x8000, 0xFFFF, "all")]
    + [("values", "all")],
)
def test_the_mean_is_the_value(over, share, sign):
    every, one = torch.arange(SPAN), torch.full((SPAN,), 77)
    bits = (BASE | sign) + (every if share == "all" else share * torch.ones_like(every))
    away = away_from_zero(as_float(bits), every if over == "entries" else one, every if over == "seeds" else one)
    chance = (bits & 0xFFFF).double() / SPAN
    assert (away - chance).sum().abs() <= 5 * (chance * (1 - chance)).sum().sqrt()


# Two independent choices differ with probability 2 x (1 - x), in the mean over shares x one third.
@pytest.mark.parametrize("low, seed", [(0, 1), (1, 0), (1, 1), (256, 0), (0, 1 << 30)])
def test_entries_and_seeds_choose_independently(low, seed):
    value, here = as_float(BASE + torch.arange(SPAN)), torch.full((SPAN,), 300)
    differ = away_from_zero(value, here, 12) != away_from_zero(value, here ^ low, 12 ^ seed)
    assert (differ.double().mean() - 1 / 3).abs() <= 5 * (2 / 9 / SPAN) ** 0.5


def unusual():
    """Zeros, the smallest and largest of their kinds, all infinities, NaNs of any bits; each also negative."""
    found = [0, 1, 0xFFFF, 0x7FFFFF, 0x800000, 0x800001, BASE, BASE + 1, 0x7F7F0000, 0x7F7F8000, LARGEST]
    found += [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    return as_float(torch.tensor(found + [bits | 1 << 31 for bits in found])).to(DEVICE)


@IMPLS
def test_what_may_become_of_each_number(impl):
    values = unusual()
    dense, at = torch.zeros(len(values), dtype=torch.bfloat16, device=DEVICE), torch.arange(len(values), device=DEVICE)
    for seed in (0, 1, 2**31 - 1):
        scatter_(dense, Positions.pack(at, len(values)), values, rounding_seed=seed, impl=impl)
        assert torch.equal(dense.isnan(), values.isnan()) and torch.equal(dense.isfinite(), values.isfinite())
        bits, rounded, counts = as_bits(values), as_bits(dense), ~values.isnan()
        exact = counts & (bits & 0xFFFF == 0)
        assert torch.equal(rounded[exact], bits[exact]), "what bf16 holds, zeros with their sign and infinity too"
        step = (rounded - (bits & 0xFFFF0000))[counts]
        assert ((step == 0) | (step == 0x10000)).all()


@IMPLS
def test_values_in_sixteen_bits_are_written_as_they_are(impl):
    random, at = drawing(DEVICE), selected(DEVICE, (500,), "5%")
    dense, values = random(500, dtype=torch.bfloat16), random(len(at), dtype=torch.bfloat16)
    scatter_(dense, at, values, rounding_seed=3, impl=impl)
    assert torch.equal(dense[at.unpack()], values)


def write(kind, weights, at, impl, seed):
    """By the operation of this kind; -> the fp32 values that were written."""
    random, k = drawing(DEVICE), len(at)
    values = random(k)
    if kind == "scatter_":
        scatter_(weights, at, values, rounding_seed=seed, impl=impl)
    else:
        state = (values, random(k), random(k), random(k).abs())
        masked_adamw_(*state, weight=weights, positions=at, rounding_seed=seed, impl=impl, **SETTINGS)
    return values


# Each weight is that of its tensor alone, by the definition, from the values: whoever has a file of them gets the same.
@IMPLS
@pytest.mark.parametrize("kind", ["scatter_", "masked_adamw_"])
@pytest.mark.parametrize("sizes", [(70_001,), (SPAN, 3, 0, 70_001)], ids=["one", "list"])
def test_weights_follow_from_their_values_alone(sizes, kind, impl):
    at, random = selected(DEVICE, sizes, "5%"), drawing(DEVICE, seed=8)
    before = [random(size, dtype=torch.bfloat16) for size in sizes]
    weights = [weight.clone() for weight in before]
    values = write(kind, weights if len(sizes) > 1 else weights[0], at, impl, seed=9)
    for weight, start, part, mine in zip(weights, before, at.parts, values.split(at.counts), strict=True):
        index = part.unpack()
        expected = start.clone()
        expected[index] = stochastically(mine, index % SPAN, 9).bfloat16()
        assert torch.equal(weight, expected)
        assert torch.equal(weight[index], rounded(mine, part.low, torch.bfloat16, 9))
    assert (weights[0][at.parts[0].unpack()] != values[: at.counts[0]].bfloat16()).any(), "not to nearest"


@IMPLS
@pytest.mark.parametrize("kind", ["scatter_", "masked_adamw_"])
def test_other_seeds_give_other_weights_and_the_same_seed_the_same(kind, impl):
    at, found = selected(DEVICE, (20_000,), "5%"), []
    for seed in (1, 2, 1):
        found.append(torch.zeros(20_000, dtype=torch.bfloat16, device=DEVICE))
        write(kind, found[-1], at, impl, seed)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@IMPLS
@pytest.mark.parametrize("kind", ["scatter_", "masked_adamw_"])
def test_fp32_has_nothing_to_round(kind, impl):
    at, weight = selected(DEVICE, (3000,), "5%"), torch.zeros(3000, device=DEVICE)
    values = write(kind, weight, at, impl, seed=4)
    assert torch.equal(weight[at.unpack()], values) and weight.count_nonzero() == len(at)


@pytest.mark.parametrize("part", [7, 1 << 22])
def test_what_is_written_is_known_without_a_weight(monkeypatch, part):
    monkeypatch.setattr(rounding, "_PART", part)
    at = selected(DEVICE, (300,), "5%")
    values, index = drawing(DEVICE)(len(at)), at.unpack()
    assert torch.equal(rounded(values, at.low, torch.bfloat16, 2), stochastically(values, index, 2).bfloat16())
    assert torch.equal(rounded(values, at.low, torch.bfloat16, None), values.bfloat16())
    assert torch.equal(rounded(values, at.low, torch.float32, 2), values)
    assert rounded(values[:0], at.low[:0], torch.bfloat16, 2).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="got torch.float16"):
        rounded(values, at.low, torch.float16, 2)


@IMPLS
@pytest.mark.parametrize("kind", ["scatter_", "masked_adamw_"])
def test_refused(kind, impl):
    at = selected(DEVICE, (300,), "5%")
    for seed in (-1, 2**31, 1.0, True, torch.tensor(1)):
        weight = torch.zeros(300, dtype=torch.bfloat16, device=DEVICE)
        with pytest.raises(ValueError, match="rounding_seed: expected None or an integer in 0..2147483647, got"):
            write(kind, weight, at, impl, seed)
        assert not weight.any()
    half = torch.zeros(300, dtype=torch.float16, device=DEVICE)
    for weights in (half, [half]):
        with pytest.raises(ValueError, match="rounding_seed: expected weights in .*, got torch.float16"):
            write(kind, weights, at, impl, seed=1)
    assert not half.any()
