"""Which backend trains a policy."""

from typing import TYPE_CHECKING

from allo_fast.config import TrainConfig
from allo_fast.method.dense import DensePolicy
from allo_fast.method.policy import SparsePolicy
from allo_fast.training.backend import LocalBackend
from allo_fast.training.zero import Zero

if TYPE_CHECKING:
    from allo_fast.training.backend_deepspeed import DeepSpeedBackend


def make_backend(
    policy: DensePolicy | SparsePolicy, config: TrainConfig, total_steps: int, protocol: str, zero: Zero | None
) -> "LocalBackend | DeepSpeedBackend":
    """On ranks where `zero` says how, else in this process."""
    if zero is None:
        return LocalBackend(policy, config, total_steps, protocol)
    from allo_fast.training.backend_deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(policy, config, total_steps, zero)
