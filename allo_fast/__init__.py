"""ALLO: align a language model by training a few percent of its weights."""

from allo_fast.method.delta import Delta
from allo_fast.method.objectives import dpo_loss, npo_token_loss
from allo_fast.method.optim import SparseAdamW
from allo_fast.method.policy import DensePolicy, SparsePolicy
from allo_fast.method.selection import Selection
from allo_kernels import key_token_weights

__all__ = [
    "Delta",
    "DensePolicy",
    "Selection",
    "SparseAdamW",
    "SparsePolicy",
    "dpo_loss",
    "key_token_weights",
    "npo_token_loss",
]
