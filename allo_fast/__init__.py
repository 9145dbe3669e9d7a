"""ALLO: align a language model by training a few percent of its weights."""

from importlib import import_module

__version__ = "0.1.0"

_PLACES = {
    "Delta": "allo_fast.method.delta",
    "DensePolicy": "allo_fast.method.dense",
    "Selection": "allo_fast.method.selection",
    "SparseAdamW": "allo_fast.method.optim",
    "SparsePolicy": "allo_fast.method.policy",
    "dpo_loss": "allo_fast.method.objectives",
    "load_delta": "allo_fast.method.loaded",
    "key_token_weights": "allo_kernels",
    "npo_token_loss": "allo_fast.method.objectives",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> object:
    """Imported when it is asked for: torch and transformers take seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
