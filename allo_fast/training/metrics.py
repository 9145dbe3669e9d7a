"""What an optimizer step says of itself: a line of metrics.jsonl."""

from dataclasses import dataclass, field

LOG = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    step: int  # from 1
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int  # of prompts, once for all their responses, and of responses but for the last of each
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        row = dict(vars(self))
        metrics = row.pop("metrics")
        return {**row, **metrics}
