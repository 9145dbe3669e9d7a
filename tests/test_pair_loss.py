import math

import pytest
import torch

from allo_fast.method.objectives import dpo_loss
from allo_kernels import key_token_dpo_loss, key_token_weights
from tests.conftest import DEVICE


def pair(seed=0, chosen=5, rejected=8):
    draw = torch.Generator().manual_seed(seed)
    logps = [-torch.rand(2, length, generator=draw) for length in (chosen, rejected, chosen, rejected)]
    valid = [torch.ones(2, length, dtype=torch.bool) for length in (chosen, rejected)]
    valid[1][1, 6:] = False
    return [*logps, *valid]


def test_fraction_1_is_dpo_on_whole_responses():
    chosen, rejected, ref_chosen, ref_rejected, chosen_valid, rejected_valid = given = pair()
    settings = {"beta": 0.3, "label_smoothing": 0.1}
    sums = [side.sum(1) for side in (chosen, rejected * rejected_valid, ref_chosen, ref_rejected * rejected_valid)]
    losses, *rewards, weights = key_token_dpo_loss(*given, fraction=1.0, **settings)
    for ours, wanted in zip((losses, *rewards), dpo_loss(*sums, **settings), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert torch.equal(weights, rejected_valid.float())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_comes_out_may_be_changed_in_place(impl):
    given = pair()
    given[0].requires_grad_()
    losses, *others = key_token_dpo_loss(*given, fraction=0.5, beta=0.3, impl=impl)
    (expected,) = torch.autograd.grad((2 * losses).sum(), given[0], retain_graph=True)
    for other in others:
        other.zero_()
    torch.testing.assert_close(torch.autograd.grad(losses.mul_(2).sum(), given[0])[0], expected)


def test_by_hand():
    zeros, valid = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    ratios = torch.tensor([[0.2, -0.4, 0.1]], requires_grad=True)
    chosen = torch.tensor([[0.5, 0.0, 0.0]], requires_grad=True)
    found = key_token_dpo_loss(chosen, ratios, zeros, zeros, valid, valid, fraction=0.34, beta=2.0)
    margin = torch.tensor(2 * (0.5 + 0.4))
    assert found[3].tolist() == [[0, 1, 0]] and found[0].item() == pytest.approx(float(torch.log1p((-margin).exp())))
    found[0].sum().backward()
    slope = 2 * float(torch.sigmoid(-margin))
    torch.testing.assert_close(ratios.grad, torch.tensor([[0.0, slope, 0.0]]))
    torch.testing.assert_close(chosen.grad, torch.full((1, 3), -slope))


def test_key_tokens():
    ratios = torch.tensor([[3.0, -1.0, 2.0, -5.0, 0.0], [0.0] * 5, [1.0] * 5])
    valid = torch.tensor([[True] * 4 + [False], [True] * 5, [False] * 5])
    assert key_token_weights(ratios, valid, 0.5).tolist() == [[0, 1, 0, 1, 0], [1] * 5, [0] * 5]
    assert key_token_weights(ratios, valid, 0.0)[0].tolist() == [0, 0, 0, 1, 0], "never none"


def test_a_fraction_is_the_decimal_that_was_written():
    # 0.1 * 30 is 3.0000000000000004 and 0.29 * 100 is 28.999999999999996.
    for fraction, length, count in ((0.1, 30, 3), (0.29, 100, 29), (1.0, 7, 7)):
        weights = key_token_weights(torch.randn(1, length), torch.ones(1, length, dtype=torch.bool), fraction)
        assert weights.sum() == count


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_bad_arguments(impl):
    names = "chosen_logps rejected_logps ref_chosen_logps ref_rejected_logps chosen_valid rejected_valid".split()
    for message, change in (
        (r"chosen_logps: expected \[2, T\]", {"chosen_logps": torch.zeros(2)}),
        (r"rejected_logps: expected \[2, T\]", {"rejected_logps": torch.zeros(3, 8)}),
        ("ref_chosen_logps: expected shape", {"ref_chosen_logps": torch.zeros(2, 4)}),
        ("ref_rejected_logps: expected torch.bfloat16", {"ref_rejected_logps": torch.zeros(2, 8).double()}),
        ("ref_rejected_logps: expected a tensor on cpu", {"ref_rejected_logps": torch.zeros(2, 8, device="meta")}),
        ("chosen_valid: expected torch.bool", {"chosen_valid": torch.ones(2, 5)}),
        ("rejected_valid: expected shape", {"rejected_valid": torch.ones(2, 7).bool()}),
        ("fraction: expected 0..1", {"fraction": -0.1}),
    ):
        given = dict(zip(names, pair(), strict=True)) | {"fraction": 0.1, "beta": 0.1} | change
        with pytest.raises(ValueError, match=message):
            key_token_dpo_loss(**given, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_a_nan_is_never_left_out(impl, nan):
    zeros, valid = torch.zeros(1, 4, device=DEVICE), torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    ratios = torch.tensor([[-1.0, nan, -2.0, -3.0]], device=DEVICE)
    losses, *_, weights = key_token_dpo_loss(
        zeros, ratios, zeros, zeros, valid, valid, fraction=0.5, beta=1.0, impl=impl
    )
    assert losses.isnan().all() and weights.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_does_not_count_cannot_spoil_the_loss(impl):
    """Padding and tokens that are not key may hold anything; infinity that counts comes before padding."""
    ratios = torch.tensor([[-torch.inf, torch.inf, -1.0, float("nan")]], device=DEVICE)
    chosen_valid = torch.tensor([[False, False, True, False]], device=DEVICE)
    zeros, valid = torch.zeros_like(ratios), torch.tensor([[False, True, True, False]], device=DEVICE)
    found = key_token_dpo_loss(ratios, ratios, zeros, zeros, chosen_valid, valid, fraction=0.5, beta=1.0, impl=impl)
    assert found[0].item() == pytest.approx(math.log(2)) and found[3].tolist() == [[0, 0, 1, 0]]
    found = key_token_dpo_loss(zeros, ratios, zeros, zeros, valid, valid, fraction=1.0, beta=1.0, impl=impl)
    assert found[3].tolist() == [[0, 1, 1, 0]], "the highest that counts comes before what does not"


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_losses_of_settled_pairs_keep_their_digits(impl):
    """log(1 + s) for s from 1 to 1e-17: 1 + s alone would leave a loss of 1e-4 three digits."""
    margins = torch.arange(0.0, 40.0, 3.7, device=DEVICE)[:, None]
    zeros, valid = torch.zeros_like(margins), torch.ones_like(margins).bool()
    losses = key_token_dpo_loss(margins, zeros, zeros, zeros, valid, valid, fraction=1.0, beta=1.0, impl=impl)[0]
    exact = torch.nn.functional.softplus(-margins.double(), threshold=100).squeeze(1)
    relative = (losses - exact).abs() / exact
    assert (relative <= torch.finfo(torch.float32).eps * (4 + margins.squeeze(1))).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_small_losses_and_what_gets_a_gradient(impl):
    moved = [tensor.to(DEVICE) for tensor in pair()]
    given = [tensor.requires_grad_() if index < 4 else tensor for index, tensor in enumerate(moved)]
    given[0] = (given[0].detach() + 20).requires_grad_()
    losses = key_token_dpo_loss(*given, fraction=0.5, beta=0.3, impl=impl)[0]
    margin = losses.detach().double().expm1().log().neg()
    assert (losses > 1e-14).all() and (margin > 25).all(), "the loss of a settled pair is small, not zero"
    assert torch.autograd.grad(losses.sum(), given[2], allow_unused=True, retain_graph=True) == (None,)
