"""Each loss by hand, gradients against finite differences, and what a step makes of them."""

from math import exp, log, log1p

import pytest
import torch
from conftest import pair_corpus
from torch.nn import functional as F

from allo_fast.config import LearnConfig
from allo_fast.config_train import LOSSES as NAMES
from allo_fast.config_train import WITHOUT_REFERENCE
from allo_fast.data.batch import collate
from allo_fast.data.corpus import Corpus
from allo_fast.method.objectives import Preference
from allo_fast.method.pair_losses import LOSSES, Pairs, Settings
from allo_kernels import key_token_weights

SETTINGS = Settings(beta=0.5, label_smoothing=0.2, simpo_gamma=0.3, length_alpha=0.25)
# One pair: r_w = -4 + 6 = 2 over 4 tokens, r_l = -9 + 8 = -1 over 2.
ONE = {"chosen": -4.0, "rejected": -9.0, "chosen_tokens": 4, "rejected_tokens": 2, "ref_chosen": -6.0}
ONE |= {"ref_rejected": -8.0}


def nls(x: float) -> float:
    """-log sigmoid."""
    return log1p(exp(-x))


def odds(logp: float) -> float:
    return logp - log(1 - exp(logp))


BY_HAND = {
    "sigmoid": 0.8 * nls(1.5 + 0.5) + 0.2 * nls(-1.5 - 0.5),
    "robust": (0.8 * nls(1.5) - 0.2 * nls(-1.5)) / 0.6,
    "hinge": 0.0,
    "ipo": (0.5 + 0.5 - 1.0) ** 2,
    "bco_pair": nls(1.0) + nls(0.5),
    "apo_zero": 1 / (1 + exp(1.0)) + 1 / (1 + exp(0.5)),
    "sigmoid_norm": nls(0.5 * (0.5 + 0.5)),
    "npo": 4 * nls(0.5),
    "simpo": 0.8 * nls(0.5 * 3.5 - 0.3) + 0.2 * nls(-0.5 * 3.5 + 0.3),
    "confpo": 0.8 * nls(0.5 * 3.5 - 0.3) + 0.2 * nls(-0.5 * 3.5 + 0.3),  # of the tokens that it is given
    "orpo": 1.0 + 0.5 * nls(odds(-1.0) - odds(-4.5)),
    "sft": 1.0,
}


def pairs(changes: dict | None = None, dtype=torch.float64) -> Pairs:
    return Pairs(**{name: torch.tensor([value], dtype=dtype) for name, value in (ONE | (changes or {})).items()})


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name):
    assert LOSSES[name](pairs(), SETTINGS).item() == pytest.approx(BY_HAND[name], rel=1e-12, abs=1e-12)


def test_hinge_and_ipo_where_they_are_not_zero():
    swapped = pairs({"chosen": -9.0, "rejected": -4.0, "ref_chosen": -8.0, "ref_rejected": -6.0})  # m = -1.5
    assert LOSSES["hinge"](swapped, SETTINGS).item() == 2.5
    assert LOSSES["ipo"](swapped, SETTINGS).item() == pytest.approx((-0.25 - 1.0 - 1.0) ** 2)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    draw = torch.Generator().manual_seed(0)

    def of(chosen, rejected):
        drawn = {"chosen_tokens": torch.tensor([3, 9, 1]), "rejected_tokens": torch.tensor([5, 2, 1])}
        reference = {"ref_chosen": torch.full((3,), -4.1), "ref_rejected": torch.full((3,), -7.3)}
        return LOSSES[name](Pairs(chosen, rejected, **drawn, **reference), SETTINGS)

    sums = [(-9 * torch.rand(3, generator=draw, dtype=torch.double) - 0.1).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(of, sums)


@pytest.mark.parametrize("chosen, rejected", [(0.0, -1e-8), (-1e-30, -1e4), (-1e4, 0.0)])
def test_odds_of_what_is_certain_are_finite(chosen, rejected):
    sums = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected)]
    loss = LOSSES["orpo"](Pairs(*sums, torch.ones(1), torch.ones(1)), SETTINGS)
    assert loss.isfinite().all() and all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, sums))


def batch_of_noise():
    batch = collate(corpus := pair_corpus(7), corpus.examples)
    draw = torch.Generator().manual_seed(3)
    logps, ref = (-torch.rand(batch.valid.shape, generator=draw) * batch.valid for _ in range(2))
    return batch, logps, ref


def test_confpo_sees_tokens_below_their_responses_mean_probability():
    corpus = Corpus()
    corpus.examples = [tuple(corpus.add([1, 2], [[3, 4, 5], [6, 7]])), tuple(corpus.add([1], [[3, 3], [4]]))]
    batch = collate(corpus, corpus.examples)
    lines = {"345": [0.9, 0.2, 0.1], "67": [0.5, 0.3], "33": [0.9, 0.1], "4": [0.4]}
    logps = torch.zeros(batch.valid.shape)
    for line, numbers in enumerate(lines.values()):
        logps[line, : len(numbers)] = torch.tensor(numbers).log()
    logps.requires_grad_()
    loss, _ = Preference(2.0, losses=(("confpo", 1.0),), simpo_gamma=0.5)(logps, None, batch)
    margin = 2.0 * ((log(0.2) + log(0.1)) / 2 - log(0.3)) - 0.5
    assert loss.item() == pytest.approx((nls(margin) + 0) / 2, rel=1e-5), "one token is not below its own mean"
    loss.backward()
    moved = [
        [column for column in range(n) if logps.grad[line, column]] for line, n in ((0, 3), (1, 2), (2, 2), (3, 1))
    ]
    assert moved == [[1, 2], [1], [], []]


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "confpo"])
def test_a_batch_is_the_mean_of_its_pairs(name):
    batch, logps, ref = batch_of_noise()
    objective = Preference(0.5, losses=((name, 1.0),), simpo_gamma=0.3)
    assert objective.needs_reference == (name not in WITHOUT_REFERENCE)
    loss, metrics = objective(logps, ref if objective.needs_reference else None, batch)
    chosen, rejected = batch.examples.unbind(1)
    sums, tokens, of_ref = logps.sum(1), batch.valid.sum(1), ref.sum(1)
    every = Pairs(sums[chosen], sums[rejected], tokens[chosen], tokens[rejected], of_ref[chosen], of_ref[rejected])
    torch.testing.assert_close(loss, LOSSES[name](every, Settings(0.5, simpo_gamma=0.3)).mean())
    rewards = 0.5 * (sums - of_ref if objective.needs_reference else sums / tokens)
    assert metrics["rewards/margins"].item() == pytest.approx((rewards[chosen] - rewards[rejected]).mean().item())
    assert metrics["key_tokens"] == 1 and not any(key.startswith("key_rewards") for key in metrics)


def test_a_sum_of_losses_has_their_weights():
    batch, logps, ref = batch_of_noise()
    dpo, sft, both = (
        Preference(0.5, losses=losses)(logps, ref, batch)[0]
        for losses in ((("sigmoid", 1.0),), (("sft", 1.0),), (("sigmoid", 1.0), ("sft", 0.3)))
    )
    torch.testing.assert_close(both, dpo + 0.3 * sft)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WITHOUT_REFERENCE])
def test_key_tokens_are_those_of_any_loss(name):
    """Log-ratios of the rejected response (3, -1): half of it is its second token."""
    corpus = Corpus()
    corpus.examples = [tuple(corpus.add([1], [[2, 3], [4, 5]]))]
    batch, ref = collate(corpus, corpus.examples), torch.full((2, 2), -7.0)
    logps = (ref + torch.tensor([[0.5, 0.5], [3.0, -1.0]])).requires_grad_()
    loss, metrics = Preference(2.0, 0.5, losses=((name, 2.0),))(logps, ref, batch)
    counted = Pairs(*(torch.tensor([value]) for value in (-13.0, -8.0, 2, 2, -14.0, -7.0)))
    torch.testing.assert_close(loss, 2 * LOSSES[name](counted, Settings(2.0)).mean())
    assert metrics["key_tokens"] == 0.5 and metrics["rewards/rejected"] == 4 and metrics["key_rewards/rejected"] == -2
    (gradient,) = torch.autograd.grad(loss, logps)
    assert gradient[1, 0] == 0


def test_lengths_are_of_whole_responses_whatever_is_key():
    batch, logps, ref = batch_of_noise()
    keyed, longer = (Preference(0.5, 0.1, length_alpha=alpha)(logps, ref, batch)[1] for alpha in (0.0, 0.7))
    assert keyed["key_rewards/margins"] == pytest.approx(longer["key_rewards/margins"].item())
    plain = Preference(0.5, 0.1, losses=(("sigmoid", 1.0),), length_alpha=0.7)(logps, ref, batch)[0]
    chosen, rejected = batch.examples.unbind(1)
    weights = key_token_weights((logps - ref)[rejected], batch.valid[rejected], 0.1)
    ratios, tokens = logps - ref, batch.valid.sum(1)
    margins = 0.5 * (ratios[chosen].sum(1) - (ratios[rejected] * weights).sum(1))
    margins += 0.7 * (tokens[chosen] - tokens[rejected])
    torch.testing.assert_close(plain, -F.logsigmoid(margins).mean())


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_key_tokens_are_of_losses_with_a_reference_alone(name):
    batch, logps, ref = batch_of_noise()
    mixed, dpo, other = (
        Preference(0.5, epsilon, losses=losses)(logps, ref, batch)[0]
        for epsilon, losses in (
            (0.1, (("sigmoid", 1.0), (name, 1.0))),
            (0.1, (("sigmoid", 1.0),)),
            (None, ((name, 1.0),)),
        )
    )
    torch.testing.assert_close(mixed, dpo + other)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_may_be_cut_anywhere(name):
    assert_it_may_be_cut(pair_corpus(7), Preference(0.5, 0.5, losses=((name, 1.0),), length_alpha=0.1))


def assert_it_may_be_cut(corpus: Corpus, objective: Preference) -> None:
    """Means over pairs, weighted by how many they are, are the mean of all."""
    draw = torch.Generator().manual_seed(3)
    drawn = -torch.rand(2, len(corpus.responses), corpus.longest, generator=draw)

    def loss(examples) -> torch.Tensor:
        batch = collate(corpus, examples)
        logps, ref = (of[batch.responses, : batch.valid.shape[1]] * batch.valid for of in drawn)
        return objective(logps, ref, batch)[0] * len(examples)

    examples = list(corpus.examples)
    torch.testing.assert_close(loss(examples[:1]) + loss(examples[1:4]) + loss(examples[4:]), loss(examples))


def test_the_fused_loss_is_the_summed_one():
    batch, logps, ref = batch_of_noise()
    (fused, metrics), (summed, others) = (
        Preference(0.5, 0.5, 0.1, losses=(("sigmoid", weight),))(logps, ref, batch) for weight in (1.0, 2.0)
    )
    torch.testing.assert_close(2 * fused, summed)
    assert metrics.keys() == others.keys()
    for key in metrics:
        torch.testing.assert_close(metrics[key], others[key])


def test_length_alpha_alone_leaves_the_fused_loss():
    batch, logps, ref = batch_of_noise()
    plain, longer = (Preference(0.5, length_alpha=alpha)(logps, ref, batch)[0] for alpha in (0.0, 1e-9))
    torch.testing.assert_close(plain, longer)
    tokens = batch.valid.sum(1)[batch.examples]
    margins = 0.5 * (logps - ref).sum(1)[batch.examples].diff().neg().squeeze(1) + 0.7 * tokens.diff().neg().squeeze(1)
    loss, _ = Preference(0.5, length_alpha=0.7)(logps, ref, batch)
    torch.testing.assert_close(loss, -F.logsigmoid(margins).mean())


def test_every_loss_can_be_configured():
    assert NAMES == tuple(LOSSES)
    assert LearnConfig(loss_type="ipo").losses == (("ipo", 1.0),)
    assert LearnConfig(loss_type=["sigmoid", "sft"], loss_weights=[1, 0.2]).losses == (("sigmoid", 1.0), ("sft", 0.2))
