"""How many windows locating takes, on paper: the fewest whose sums fit beside the base."""

import math

from allo_fast.config import LocateConfig
from allo_fast.locating.families import FAMILIES

LEAN = 0.5  # bytes a weight that the sums of a window may take where no device's memory is the job's own, as on a CPU


def sums_per_weight(score: str) -> int:
    """Bytes: the step's gradient and the family's own, in float32."""
    return 4 * (1 + FAMILIES[score].states)


def windows(locate: LocateConfig, score: str, parameters: int, room: float | None, world: int = 1) -> int:
    """room: bytes beside the base on a device; None: as few as `LEAN`. world: ranks that divide the windows."""
    if locate.windows != "auto":
        return locate.windows
    if locate.accumulators == "host":
        return 1
    needed = sums_per_weight(score) * parameters
    fewest = math.ceil(needed / max(1.0, LEAN * parameters if room is None else room))
    return math.ceil(fewest / world) * world
