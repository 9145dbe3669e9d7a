"""DPO on the key tokens of the rejected responses: their choice, the loss and its gradient in one operation."""

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from allo_kernels.checks import FLOATS, check_device, check_dtype, check_shape
from allo_kernels.dispatch import choose


def key_token_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_valid: Tensor,
    rejected_valid: Tensor,
    *,
    fraction: float,
    beta: float,
    label_smoothing: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Direct preference optimization on key tokens (ALLO, arXiv 2406.12606; DPO, arXiv 2305.18290).

        r = policy - ref     K = the floor(fraction x valid) tokens of the rejected response with the lowest r
        d = beta (sum of chosen r - sum over K of rejected r)
        loss = -(1 - s) log sigmoid(d) - s log sigmoid(-d)

    At least one token of a response is key; all valid ones are where r is zero everywhere, that is before the first
    update. Ties go to the lower index. No gradient flows through the choice. fraction 1 is DPO on whole responses.
    All tensors are [B, T]: log-probabilities in bf16, fp16 or fp32, valid in bool; chosen and rejected may differ in T.
    Returns losses [B], chosen_rewards [B], rejected_rewards [B] (detached, beta times the sums), key_weights [B, T],
    all fp32; losses are differentiable in chosen_logps and rejected_logps.
    Raises ValueError, naming the argument, for a wrong shape, dtype or device and for a fraction outside 0..1.
    """
    given = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    for name, tensor in given.items():
        like = chosen_logps if "chosen" in name else rejected_logps
        if tensor.ndim != 2 or len(tensor) != len(chosen_logps):
            raise ValueError(f"{name}: expected [{len(chosen_logps)}, T], got shape {tuple(tensor.shape)}")
        check_dtype(name, tensor, *FLOATS)
        check_shape(name, tensor, like.shape)
        check_device(name, tensor, chosen_logps.device)
    for name, mask, like in (
        ("chosen_valid", chosen_valid, chosen_logps),
        ("rejected_valid", rejected_valid, rejected_logps),
    ):
        check_shape(name, mask, like.shape)
        check_dtype(name, mask, torch.bool)
        check_device(name, mask, like.device)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected 0..1, got {fraction}")
    kernel = "pair_loss_triton.key_token_dpo_loss"
    run = choose("key_token_dpo_loss", impl, _key_token_dpo_loss_torch, kernel, chosen_logps.device)
    ref_chosen_logps, ref_rejected_logps = ref_chosen_logps.detach(), ref_rejected_logps.detach()
    pair = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return run(*pair, chosen_valid, rejected_valid, fraction, beta, label_smoothing)


def _key_token_dpo_loss_torch(
    chosen_logps, rejected_logps, ref_chosen, ref_rejected, chosen_valid, rejected_valid, fraction, beta, smoothing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ratios = rejected_logps.float() - ref_rejected.float()
    weights = key_token_weights(ratios.detach(), rejected_valid, fraction)
    chosen = beta * torch.where(chosen_valid, chosen_logps.float() - ref_chosen.float(), 0.0).sum(1)
    rejected = beta * torch.where(weights > 0, ratios, 0.0).sum(1)
    margin = chosen - rejected
    losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    return losses, chosen.detach(), rejected.detach(), weights


def key_token_weights(log_ratios: Tensor, valid: Tensor, fraction: float) -> Tensor:
    """1.0 at each row's key tokens, as `key_token_dpo_loss` chooses them; log_ratios, valid: [B, T] -> fp32 [B, T]."""
    count, (numerator, denominator) = valid.sum(dim=1), as_ratio(fraction)
    keep = (count * numerator // denominator).clamp(min=1)
    untouched = ((log_ratios == 0) | ~valid).all(dim=1)
    return _first_weights(-log_ratios, valid, torch.where(untouched, count, keep)) * valid


def as_ratio(fraction: float) -> tuple[int, int]:
    """The decimal that was written, as integers: 0.29 of 100 is 29, which it is not in binary."""
    return Fraction(str(fraction)).limit_denominator(10**9).as_integer_ratio()


def _first_weights(scores: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
    """Per row, 1.0 at the keep[b] largest valid scores."""
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    valid_first = valid.gather(1, by_score).logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    ranked = by_score.gather(1, valid_first)
    weights = (torch.arange(scores.shape[1], device=scores.device) < keep[:, None]).float()
    return torch.zeros_like(weights).scatter_(1, ranked, weights)
