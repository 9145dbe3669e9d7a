"""What the engine calls on a batch: SFT, NPO and losses on pairs; and the token-wise losses as pure functions.

Shapes: B sequences or pairs, T positions, R responses, L tokens of the longest response.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from allo_fast.config import UserError
from allo_fast.config_train import WITHOUT_REFERENCE
from allo_fast.data.batch import Batch
from allo_fast.method.pair_losses import LOSSES, Pairs, Settings
from allo_kernels import key_token_dpo_loss, key_token_weights


def npo_token_loss(policy_logps: Tensor, ref_logps: Tensor, token_weights: Tensor, *, beta: float) -> Tensor:
    """Token-wise negative preference optimization -> scalar (ALLO, arXiv 2406.12606; NPO, arXiv 2404.05868).

    L = sum_t w_t (-log sigmoid(-beta (logp_t - ref_t))) / #{t: w_t != 0}; all tensors [B, T]; 0 when no token weighs.
    """
    losses = -token_weights * F.logsigmoid(-beta * (policy_logps - ref_logps))
    return losses.sum() / token_weights.count_nonzero().clamp(min=1)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimization (arXiv 2305.18290) -> losses [B], chosen_rewards [B], rejected_rewards [B].

    L = -(1 - s) log sigmoid(d) - s log sigmoid(-d), d = chosen_reward - rejected_reward, reward = beta (logp - ref).
    Inputs are log-probabilities of whole responses [B]. Raises ValueError for a loss type other than "sigmoid".
    """
    if loss_type != "sigmoid":
        raise ValueError(f"loss_type: expected 'sigmoid', got {loss_type!r}")
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def sft_loss(policy_logps: Tensor, valid: Tensor) -> Tensor:
    """Mean negative log-probability of the valid tokens; policy_logps, valid: [B, T] -> scalar."""
    return -(policy_logps * valid).sum() / valid.sum()


def release_key_token_weights(log_ratios: Tensor, valid: Tensor, fraction: float, padded_length: int) -> Tensor:
    """The published rule, kept to measure the difference: the fraction is of the padded length, prompt included.

    Every token whose -log_ratio is at least the k-th largest of its row is kept, k = int(fraction x padded_length),
    exact zeros counting as -1e10. Raises UserError where k is 0 (the published code fails there).
    """
    k = int(padded_length * fraction)
    if k == 0:
        raise UserError(f"learn.epsilon: {fraction} of {padded_length} padded tokens is none (protocol: release)")
    scores = torch.where((log_ratios == 0) | ~valid, -1e10, -log_ratios.detach())
    scores = F.pad(scores, (0, max(0, k - scores.shape[1])), value=-1e10)
    threshold = scores.topk(k, dim=1).values[:, -1:]
    return ((scores >= threshold)[:, : valid.shape[1]] & valid).float()


@dataclass(frozen=True)
class Sft:
    """Warm start and rewriter: every token of every response."""

    needs_reference = False
    counts = "tokens"  # what its loss is a mean over: see Examples.count

    def __call__(self, logps: Tensor, ref: Tensor | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return sft_loss(logps, batch.valid), {}


@dataclass(frozen=True)
class Npo:
    """Forgetting: the weighted tokens of each response."""

    beta: float
    needs_reference = True
    counts = "weights"
    CHANGE = "logps/forgotten_change"  # nats per token, of a step before its update

    def __call__(self, logps: Tensor, ref: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        weights = batch.token_weights
        change = ((logps.detach() - ref) * weights).sum() / weights.count_nonzero().clamp(min=1)
        return npo_token_loss(logps, ref, weights, beta=self.beta), {self.CHANGE: change}


@dataclass(frozen=True)
class Preference:
    """Learning: a sum of the losses on pairs, each with its weight. By default DPO, with epsilon None the warm-up's.

    Where a batch has token weights w, losses see w logp and w ref for logp and ref (TIS-DPO, arXiv 2410.04350, with its
    estimates as w); where it has weights of pairs, their mean is of weight times loss.

    Metrics carry TRL's names: rewards are beta (logp - ref) of whole responses, or without any reference beta times
    the mean logp of their tokens; `logps/` are sums always. With epsilon, losses that have a reference see key tokens
    only of the rejected: `key_rewards/` are the rewards of those. Which are key depends on their rewards, so that
    these accuracies and margins are high on noise too.
    """

    beta: float
    epsilon: float | None = None
    label_smoothing: float = 0.0
    protocol: str = "paper"
    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)  # names in pair_losses.LOSSES, and weights
    simpo_gamma: float = 0.5
    length_alpha: float = 0.0
    counts = "examples"

    @property
    def needs_reference(self) -> bool:
        return any(name not in WITHOUT_REFERENCE for name, _ in self.losses)

    def __call__(self, logps: Tensor, ref: Tensor | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = batch.examples.unbind(1)
        seen, seen_ref = logps, ref
        if batch.token_weights is not None:
            seen, seen_ref = logps * batch.token_weights, None if ref is None else ref * batch.token_weights
        if self.losses != (("sigmoid", 1.0),) or self.length_alpha:
            losses, *key_rewards, weights = self._summed(seen, seen_ref, batch, logps)
        elif self.epsilon is not None and self.protocol == "release":
            pairs = seen[chosen], seen[rejected], seen_ref[chosen], seen_ref[rejected]
            losses, *key_rewards, weights = self._release(*pairs, batch, rejected)
        else:
            losses, *key_rewards, weights = key_token_dpo_loss(
                seen[chosen],
                seen[rejected],
                seen_ref[chosen],
                seen_ref[rejected],
                batch.valid[chosen],
                batch.valid[rejected],
                fraction=1.0 if self.epsilon is None else self.epsilon,
                beta=self.beta,
                label_smoothing=self.label_smoothing,
            )
        sums, tokens = logps.detach().sum(1), batch.valid.sum(1)
        rewards = self.beta * (sums / tokens if ref is None else (logps.detach() - ref).sum(1))
        metrics = {
            **_reward_metrics("rewards", rewards[chosen], rewards[rejected]),
            "logps/chosen": sums[chosen].mean(),
            "logps/rejected": sums[rejected].mean(),
            "key_tokens": (weights.sum(1) / tokens[rejected]).mean(),
        }
        if self.epsilon is not None and ref is not None:
            metrics |= _reward_metrics("key_rewards", *key_rewards)
        losses = losses if batch.loss_weights is None else losses * batch.loss_weights
        return losses.mean(), metrics

    def _summed(self, logps: Tensor, ref: Tensor | None, batch: Batch, unweighted: Tensor) -> tuple[Tensor, ...]:
        """Losses, rewards and key tokens of each pair, as key_token_dpo_loss has them."""
        chosen, rejected = batch.examples.unbind(1)
        every, tokens = batch.valid[rejected].float(), batch.valid.sum(1).float()

        def pairs(weights: Tensor) -> Pairs:
            """Of the rejected tokens that weigh; lengths are of all."""

            def sums(of_tokens: Tensor) -> tuple[Tensor, Tensor]:
                return of_tokens[chosen].sum(1), (of_tokens[rejected] * weights).sum(1)

            return Pairs(*sums(logps), tokens[chosen], tokens[rejected], *(() if ref is None else sums(ref)))

        weights = every
        if ref is not None and self.epsilon is not None:
            weights = key_token_weights((logps - ref)[rejected].detach(), batch.valid[rejected], self.epsilon)
        whole, keyed = pairs(every), pairs(weights)
        settings = Settings(self.beta, self.label_smoothing, self.simpo_gamma, self.length_alpha)

        def seen_by(name: str) -> Pairs:
            if name == "confpo":
                return _unsure_pairs(logps, batch, unweighted)
            return whole if name in WITHOUT_REFERENCE else keyed

        losses = sum(weight * LOSSES[name](seen_by(name), settings) for name, weight in self.losses)
        rewards = () if ref is None else keyed.ratios
        return losses, *(self.beta * reward.detach() for reward in rewards), weights

    def _release(self, chosen, rejected, ref_chosen, ref_rejected, batch: Batch, index: Tensor) -> tuple[Tensor, ...]:
        log_ratios = (rejected - ref_rejected).detach()
        weights = release_key_token_weights(log_ratios, batch.valid[index], self.epsilon, batch.longest)
        sums = chosen.sum(1), (rejected * weights).sum(1), ref_chosen.sum(1), (ref_rejected * weights).sum(1)
        return *dpo_loss(*sums, beta=self.beta, label_smoothing=self.label_smoothing), weights


def _unsure_pairs(logps: Tensor, batch: Batch, unweighted: Tensor) -> Pairs:
    """Of tokens that are less probable than the mean of their response's; which are has no gradient."""
    chosen, rejected = batch.examples.unbind(1)
    probabilities = unweighted.detach().exp() * batch.valid
    means = probabilities.sum(1, keepdim=True) / batch.valid.sum(1, keepdim=True)
    unsure = ((probabilities < means) & batch.valid).to(logps)
    sums, tokens = (logps * unsure).sum(1), unsure.sum(1)
    return Pairs(sums[chosen], sums[rejected], tokens[chosen], tokens[rejected])


def _reward_metrics(name: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Means over pairs; chosen, rejected: [E]. Equal rewards are not right."""
    return {
        f"{name}/chosen": chosen.mean(),
        f"{name}/rejected": rejected.mean(),
        f"{name}/margins": (chosen - rejected).mean(),
        f"{name}/accuracies": (chosen > rejected).float().mean(),
    }
