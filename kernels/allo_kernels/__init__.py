"""What is fast in allo-fast: fused operations on compact state, each beside its definition in plain PyTorch."""

from allo_kernels.adamw import masked_adamw_
from allo_kernels.compact import gather, scatter_, swap_
from allo_kernels.head import head_row_gradient, token_logps
from allo_kernels.pair_loss import key_token_dpo_loss, key_token_weights
from allo_kernels.positions import Positions
from allo_kernels.topk import Threshold, topk_threshold

__all__ = [
    "Positions",
    "Threshold",
    "gather",
    "head_row_gradient",
    "key_token_dpo_loss",
    "key_token_weights",
    "masked_adamw_",
    "scatter_",
    "swap_",
    "token_logps",
    "topk_threshold",
]
