import json

import pytest
import torch
from conftest import pair_corpus, shared
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from allo_fast.data.batch import collate
from allo_fast.data.corpus import Corpus
from allo_fast.method.objectives import (
    Preference,
    dpo_loss,
    npo_token_loss,
    release_key_token_weights,
    sft_loss,
)
from allo_kernels import key_token_weights, token_logps


def test_npo_reproduces_the_release():
    golden = load_file(shared("golden/forgetting_npo.safetensors"))
    logits = golden["logits"].requires_grad_()
    # An identity head makes token_logps read logits.
    logps = token_logps(logits, torch.eye(logits.shape[1]), golden["labels"])
    torch.testing.assert_close(logps, golden["logps"], rtol=0, atol=2e-6)
    loss = npo_token_loss(logps[None], golden["ref_logps"][None], golden["token_weight"][None], beta=0.1)
    torch.testing.assert_close(loss, golden["loss"][0], rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, golden["grad_logits"], rtol=1e-5, atol=1e-8)


def test_npo_gradient_is_the_closed_form():
    logps, ref = torch.randn(2, 5, dtype=torch.double, requires_grad=True), torch.randn(2, 5, dtype=torch.double)
    weights = torch.tensor([[0.0, 1, 0.5, 0, 1], [0, 0, 0, 0, 2]], dtype=torch.double)
    npo_token_loss(logps, ref, weights, beta=0.3).backward()
    expected = weights * 0.3 * torch.sigmoid(0.3 * (logps.detach() - ref)) / 4
    torch.testing.assert_close(logps.grad, expected)


def test_npo_without_weighted_tokens_is_zero_not_nan():
    assert npo_token_loss(torch.randn(1, 3), torch.randn(1, 3), torch.zeros(1, 3), beta=0.1) == 0


@pytest.mark.parametrize("case", "abc")
def test_learning_reproduces_the_release(case):
    path = shared("golden/learning_dpo.safetensors")
    golden = {k.split(".")[1]: v for k, v in load_file(path).items() if k.startswith(case)}
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["cases"])[case]
    chosen, rejected = golden["policy_chosen"].requires_grad_(), golden["policy_rejected"].requires_grad_()
    valid = golden["rejected_valid"].bool()
    ratios = (rejected - golden["ref_rejected"]).detach() * valid
    weights = release_key_token_weights(ratios, valid, settings["epsilon"], valid.shape[1])
    losses, _, _ = dpo_loss(
        (chosen * golden["chosen_valid"]).sum(1),
        (rejected * weights).sum(1),
        (golden["ref_chosen"] * golden["chosen_valid"]).sum(1),
        (golden["ref_rejected"] * weights).sum(1),
        beta=settings["beta"],
    )
    torch.testing.assert_close(losses, golden["losses"], rtol=1e-5, atol=1e-6)
    losses.mean().backward()
    torch.testing.assert_close(chosen.grad, golden["grad_policy_chosen"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(rejected.grad, golden["grad_policy_rejected"], rtol=1e-4, atol=1e-7)


def test_dpo_by_hand():
    one = torch.ones(1)
    losses, chosen, rejected = dpo_loss(2 * one, -3 * one, one, -one, beta=0.5)
    assert (chosen.item(), rejected.item()) == (0.5, -1.0)
    torch.testing.assert_close(losses, -F.logsigmoid(torch.tensor([1.5])))
    smoothed, _, _ = dpo_loss(2 * one, -3 * one, one, -one, beta=0.5, label_smoothing=0.1)
    torch.testing.assert_close(smoothed, 0.9 * losses - 0.1 * F.logsigmoid(torch.tensor([-1.5])))
    with pytest.raises(ValueError, match="loss_type.*hinge"):
        dpo_loss(one, one, one, one, beta=0.1, loss_type="hinge")


def test_sft_ignores_padding():
    logps, valid = torch.tensor([[-1.0, -3.0, -100.0]]), torch.tensor([[True, True, False]])
    assert sft_loss(logps, valid) == 2.0


def test_key_tokens_are_the_lowest_ratios_of_the_response():
    ratios = torch.tensor([[0.5, -1.0, 0.1, -2.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    weights = key_token_weights(ratios, valid, 0.5)
    assert weights[0].tolist() == [0, 1, 0, 1, 0]
    assert key_token_weights(ratios, valid, 0.1)[0].tolist() == [0, 0, 0, 1, 0], "never none, however short"
    assert weights[1].tolist() == [1, 1, 0, 0, 0], "before the first update every token is key"


def test_release_key_tokens_depend_on_the_padding():
    ratios, valid = torch.tensor([[-1.0, -2.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert release_key_token_weights(ratios, valid, 0.1, 10).tolist() == [[0, 1, 0]]
    assert release_key_token_weights(ratios, valid, 0.1, 20).tolist() == [[1, 1, 0]]
    assert release_key_token_weights(ratios, valid, 0.1, 90).tolist() == [[1, 1, 1]]
    with pytest.raises(ValueError, match="0.1 of 9 padded tokens"):
        release_key_token_weights(ratios, valid, 0.1, 9)


def noise(problems: int):
    """A batch, and log-probabilities that differ from the reference's by noise: nothing was learned."""
    batch = collate(corpus := pair_corpus(problems), corpus.examples)
    draw = torch.Generator().manual_seed(3)
    ref, change = (torch.randn(batch.valid.shape, generator=draw) * batch.valid for _ in range(2))
    return batch, ref + change, ref


@pytest.mark.parametrize("protocol, epsilon", [("paper", 0.1), ("paper", 0.5), ("release", 0.1), ("release", 0.5)])
def test_rewards_of_noise_are_even(protocol, epsilon):
    batch, logps, ref = noise(1000)
    _, metrics = Preference(0.1, epsilon, protocol=protocol)(logps, ref, batch)
    assert metrics["rewards/accuracies"].item() == pytest.approx(0.5, abs=0.04)
    assert metrics["rewards/margins"].item() == pytest.approx(0.0, abs=0.02)
    if metrics["key_tokens"] < 1:  # half of the release's padded length is all of these responses
        assert metrics["key_rewards/accuracies"] > 0.55 and metrics["key_rewards/margins"] > 0.05, "chosen to be low"
    assert metrics["key_rewards/chosen"].item() == pytest.approx(metrics["rewards/chosen"].item(), abs=1e-6)


@pytest.mark.parametrize("protocol", ["paper", "release"])
def test_reward_metrics_by_hand(protocol):
    """Log-ratios of chosen (0.5, 0.5), of rejected (3, -1): as wholes 1 < 2, on the one key token 1 > -1."""
    corpus = Corpus()
    corpus.examples = [tuple(corpus.add([1], [[2, 3], [4, 5]]))]
    batch, ref = collate(corpus, corpus.examples), torch.full((2, 2), -7.0)
    logps = ref + torch.tensor([[0.5, 0.5], [3.0, -1.0]])
    epsilon = 0.5 if protocol == "paper" else 0.34  # of the release's three padded tokens, prompt included
    loss, metrics = Preference(2.0, epsilon, protocol=protocol)(logps, ref, batch)
    by_hand = {"chosen": 2.0, "rejected": 4.0, "margins": -2.0, "accuracies": 0.0}
    key_tokens = {"chosen": 2.0, "rejected": -2.0, "margins": 4.0, "accuracies": 1.0}
    for name in by_hand:
        assert metrics[f"rewards/{name}"].item() == pytest.approx(by_hand[name]), name
        assert metrics[f"key_rewards/{name}"].item() == pytest.approx(key_tokens[name]), name
    assert (metrics["logps/chosen"].item(), metrics["logps/rejected"].item()) == pytest.approx((-13, -12))
    torch.testing.assert_close(loss, -F.logsigmoid(torch.tensor(4.0)))


def test_the_warm_up_has_one_kind_of_reward():
    batch, logps, ref = noise(20)
    _, metrics = Preference(0.1)(logps, ref, batch)
    rewards = 0.1 * (logps - ref).sum(1)
    chosen, rejected = batch.examples.unbind(1)
    assert metrics["rewards/accuracies"] == (rewards[chosen] > rewards[rejected]).float().mean()
    assert not any(name.startswith("key_rewards") for name in metrics)
