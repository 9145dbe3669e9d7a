"""Losses on pairs, under TRL's names where it has the loss: pure functions of log-probabilities, one number a pair.

w chosen, l rejected; logp the sum over a response's tokens, |y| their number;
r = logp - ref, m = beta (r_w - r_l), s = label_smoothing
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Pairs:
    """Of B pairs, fp32 [B] each: sums of log-probabilities, perhaps of key tokens only, and lengths of whole responses.

    ref_chosen, ref_rejected: None where the loss has no reference.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """r of chosen and rejected."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def mean_ratios(self) -> tuple[Tensor, Tensor]:
        """Per token."""
        chosen, rejected = self.ratios
        return chosen / self.chosen_tokens, rejected / self.rejected_tokens

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities per token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


@dataclass(frozen=True)
class Settings:
    """beta: of implicit rewards (ipo: tau; orpo: lambda). label_smoothing: how often labels are taken to be swapped."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    length_alpha: float = 0.0


Loss = Callable[[Pairs, Settings], Tensor]  # fp32 [B]


def sigmoid(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO (arXiv 2305.18290), with label_smoothing cDPO (which TRL's ignores), with length_alpha R-DPO (2403.19159).

    -(1 - s) log sigmoid(m') - s log sigmoid(-m'),  m' = m + length_alpha (|y_w| - |y_l|)
    """
    margins = _margins(pairs, settings) + settings.length_alpha * (pairs.chosen_tokens - pairs.rejected_tokens)
    return _smoothed(margins, settings.label_smoothing)


def robust(pairs: Pairs, settings: Settings) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased where labels are swapped with probability s.

    (-(1 - s) log sigmoid(m) + s log sigmoid(-m)) / (1 - 2 s)
    """
    margins, s = _margins(pairs, settings), settings.label_smoothing
    return (-(1 - s) * logsigmoid(margins) + s * logsigmoid(-margins)) / (1 - 2 * s)


def hinge(pairs: Pairs, settings: Settings) -> Tensor:
    """SLiC (arXiv 2305.10425), with RSO's (arXiv 2309.06657) normalised rewards: max(0, 1 - m)."""
    return torch.relu(1 - _margins(pairs, settings))


def ipo(pairs: Pairs, settings: Settings) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17), per token as TRL has it: (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2."""
    chosen, rejected = pairs.mean_ratios
    return (chosen - rejected - 1 / (2 * settings.beta)).square()


def bco_pair(pairs: Pairs, settings: Settings) -> Tensor:
    """BCO (arXiv 2404.04656) without its reward shift, as TRL: -log sigmoid(beta r_w) - log sigmoid(-beta r_l)."""
    chosen, rejected = pairs.ratios
    return -logsigmoid(settings.beta * chosen) - logsigmoid(-settings.beta * rejected)


def apo_zero(pairs: Pairs, settings: Settings) -> Tensor:
    """APO-zero (arXiv 2408.06266, equation 7), which is KTO (arXiv 2402.01306) on pairs where its KL term is zero.

    1 - sigmoid(beta r_w) + sigmoid(beta r_l)
    """
    chosen, rejected = pairs.ratios
    return torch.sigmoid(-settings.beta * chosen) + torch.sigmoid(settings.beta * rejected)


def sigmoid_norm(pairs: Pairs, settings: Settings) -> Tensor:
    """DPO of rewards per token (Tulu 3, arXiv 2411.15124): -log sigmoid(beta (r_w / |y_w| - r_l / |y_l|))."""
    chosen, rejected = pairs.mean_ratios
    return -logsigmoid(settings.beta * (chosen - rejected))


def npo(pairs: Pairs, settings: Settings) -> Tensor:
    """NPO (arXiv 2404.05868, equation 3): -(2 / beta) log sigmoid(-beta r_l), without forgetting's tokens."""
    return -2 / settings.beta * logsigmoid(-settings.beta * pairs.ratios[1])


def simpo(pairs: Pairs, settings: Settings) -> Tensor:
    """SimPO (arXiv 2405.14734), without a reference; TRL's CPOTrainer adds `sft` by default.

    -(1 - s) log sigmoid(d) - s log sigmoid(-d),  d = beta (logp_w / |y_w| - logp_l / |y_l|) - simpo_gamma
    """
    chosen, rejected = pairs.means
    return _smoothed(settings.beta * (chosen - rejected) - settings.simpo_gamma, settings.label_smoothing)


def confpo(pairs: Pairs, settings: Settings) -> Tensor:
    """ConfPO (arXiv 2506.08712): `simpo` of the tokens whose probability is below their response's mean, of which
    these pairs are; 0 where chosen or rejected has none."""
    tokens = pairs.chosen_tokens, pairs.rejected_tokens
    chosen, rejected = (count.clamp(min=1) for count in tokens)
    losses = simpo(replace(pairs, chosen_tokens=chosen, rejected_tokens=rejected), settings)
    return losses * (torch.minimum(*tokens) > 0)


def orpo(pairs: Pairs, settings: Settings) -> Tensor:
    """ORPO (arXiv 2403.07691), without a reference: `sft` (TRL's has the prompt too) and beta times the odds ratio's.

    -log p_w - beta log sigmoid(log p_w / (1 - p_w) - log p_l / (1 - p_l)),  log p = logp / |y|
    """
    chosen, rejected = pairs.means
    odds = chosen - rejected - _log_of_the_rest(chosen) + _log_of_the_rest(rejected)
    return -chosen - settings.beta * logsigmoid(odds)


def sft(pairs: Pairs, settings: Settings) -> Tensor:
    """Cross-entropy of the chosen, -logp_w / |y_w| (TRL: one mean over all tokens); with `sigmoid` RPO, 2404.19733."""
    return -pairs.means[0]


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (sigmoid, robust, hinge, ipo, bco_pair, apo_zero, sigmoid_norm, npo, simpo, confpo, orpo, sft)
}


def _margins(pairs: Pairs, settings: Settings) -> Tensor:
    chosen, rejected = pairs.ratios
    return settings.beta * (chosen - rejected)


def _smoothed(margins: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)


def _log_of_the_rest(logp: Tensor) -> Tensor:
    """log(1 - exp(logp)), exact near both ends (Maechler 2012); finite where a response is certain."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    near_one = logp > -0.6931471805599453
    # Each branch gets a number that it can bear: where() would make NaN of the other's infinite gradient.
    small, large = torch.where(near_one, logp, -1.0), torch.where(near_one, -1.0, logp)
    return torch.where(near_one, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
