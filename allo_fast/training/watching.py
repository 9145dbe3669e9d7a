"""Who looks at a policy while it trains, and may end that."""

from typing import Any, Protocol

from allo_fast import ranks
from allo_fast.training.reference import Opened


class Watch(Protocol):
    """every: steps between two looks. state: what a checkpoint keeps of the looks; None before the first. leaves: the
    step of a look whose weights are to be what training leaves; None: those of the last step are."""

    every: int
    state: Any
    leaves: int | None

    def look(self, made: int, opened: Opened, budget: int) -> dict[str, float]:
        """Metrics of the policy after `made` steps. budget: tokens of a forward pass."""

    def ends(self, seen: dict[str, float]) -> bool:
        """Whether training ends with this look."""


class Watches:
    """Those of one training, by name; steps: that it has. All are asked before the first one, which a guard
    compares with, and look after the last."""

    def __init__(self, steps: int, budget: int, **watches: Watch | None):
        self.steps, self.budget = steps, budget
        self._watches = {name: watch for name, watch in watches.items() if watch}

    @property
    def state(self) -> dict:
        return {name: watch.state for name, watch in self._watches.items()}

    @state.setter
    def state(self, state: dict) -> None:
        for name, watch in self._watches.items():
            watch.state = state[name]

    @property
    def leaves(self) -> int | None:
        return next((watch.leaves for watch in self._watches.values() if watch.leaves is not None), None)

    def look(self, made: int, opened: Opened) -> tuple[dict[str, float], bool]:
        """What those see whose turn it is, and whether training ends; on all ranks alike."""
        seen, ended = {}, False
        for watch in self._watches.values():
            if made % watch.every == 0 or made == self.steps or watch.state is None:
                found = watch.look(made, opened, self.budget)
                ended |= ranks.on_main(lambda watch=watch, found=found: watch.ends(found))
                seen |= found
        return seen, ended
