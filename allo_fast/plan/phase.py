"""What is planned: a job on a machine, and each of its stages as a phase of it."""

from dataclasses import dataclass, field

from allo_fast.config import Config
from allo_fast.plan.rows import Rows
from allo_fast.plan.shapes import Shape
from allo_fast.training.zero import trains_densely

TRANSIENT = (  # kinds of memory that live within a step only
    "locating",
    "reference",
    "activations",
    "cut states",
    "transient dW",
    "bfloat16 copies",
    "reduce buckets",
    "head workspace",
    "gathered weights",
    "reduced gradients",
    "KV cache",
    "logits",
)


@dataclass(frozen=True)
class Device:
    """What times are estimated from. flops: dense bf16, of which `mfu` is reached; memory: of which `mbu` is."""

    name: str
    peak_flops: float  # per second
    memory_bytes_per_s: float
    node_bytes_per_s: float  # to another device of the node, per direction
    network_bytes_per_s: float  # to another node, per device and direction
    per_node: int = 8
    mfu: float = 0.4
    mbu: float = 0.6
    layer_s: float = 1e-3  # that `generate` needs for a layer and token, however little there is to compute


DEVICES = {
    "h100": Device("H100", 989e12, 3.35e12, 450e9, 50e9),
    "a100": Device("A100", 312e12, 1.6e12, 300e9, 25e9),
}


@dataclass(frozen=True)
class Job:
    """shape: of the base; rewarding: of rewards.model, where that is another; judging: bytes of the reward model that
    judges answers. host_bytes: of a node, where known."""

    config: Config
    shape: Shape
    gpus: int
    gpu_bytes: float
    device: Device
    rows: Rows
    rewarding: Shape | None = None
    judging: int = 0
    host_bytes: float | None = None

    def shape_in(self, stage: str) -> Shape:
        return self.rewarding if self.rewarding and stage.startswith("rewards") else self.shape

    @property
    def devices_of_a_node(self) -> int:
        return min(self.gpus, self.device.per_node)

    @property
    def bandwidth(self) -> float:
        """Between devices, bytes per second."""
        within = self.gpus <= self.device.per_node
        return self.device.node_bytes_per_s if within else self.device.network_bytes_per_s


@dataclass(frozen=True)
class Phase:
    """One stage on one placement: bytes of device memory by kind, what it sends and computes, and how long it takes."""

    stage: str
    placement: str  # dense, resident or sharded; of what trains nothing, whole or shares
    zero_stage: int | None
    memory: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)  # bytes of host memory by kind, of each device's process
    host_main: dict[str, int] = field(default_factory=dict)  # and beside them of rank 0's
    traffic: dict[str, int] = field(default_factory=dict)  # bytes for collectives per step and device, by operation
    flops: float = 0.0  # per step and device
    checkpoint_bytes: int = 0
    scratch_bytes: int = 0  # of disk, until the stage is complete
    dense_dpo_bytes: int = 0  # states of dense DPO in bfloat16 with a reference copy, under the same stage: 18 a weight
    dense_dpo_low_bytes: int = 0  # the same with the optimizer in bfloat16 too: 10 a weight
    dense_dpo_traffic_bytes: int = 0
    step_s: float = 0.0
    seconds: float = 0.0  # of the whole stage, once
    times: int = 1  # that a run has it: of each seed, of each model
    windows: int = 0  # of locating
    passes: int = 0
    node_bytes: int = 0  # of host memory, on the node of rank 0
    sizes: tuple[str, ...] = ()  # the keys that say how much is computed at once

    @property
    def traffic_bytes(self) -> int:
        return sum(self.traffic.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def state_bytes(self) -> int:
        """Of what lives between steps and the gradients; not activations, gathered weights or workspaces."""
        return sum(size for kind, size in self.memory.items() if kind not in TRANSIENT)

    def of_node(self, devices: int) -> int:
        """Host memory of rank 0's node, with so many devices; models are loaded before anything else is there."""
        loaded = devices * self.host.get(LOADING, 0) + self.host_main.get(LOADING, 0)
        later = devices * sum(self.host.values()) + sum(self.host_main.values()) - loaded
        return max(loaded, later)


LOADING = "loading"
HOST = (LOADING, "offloaded", "accumulators", "scores", "saving")  # kinds of host memory


def kind_of(config: Config, stage: str) -> str:
    """Which of a run's two ways to be divided a stage goes, as its units see it; of a section, its stage's."""
    return "dense" if trains_densely(config, stage.partition(".")[0]) else "sparse"


def loading(model_bytes: int, shared: bool) -> dict[str, dict[str, int]]:
    """Host memory while a model is loaded: each process has it whole, or rank 0 alone reads it out to all shares."""
    return {"host_main": {LOADING: model_bytes}} if shared else {"host": {LOADING: model_bytes}}


def times_of(config: Config, section: str) -> int:
    """How often a run computes a stage: for each seed, but for what all share, and in each round that has it."""
    if section.partition(".")[0] in ("pretrain", "sft"):
        return 1
    later = section != "warmup" or config.model_copy(update={"rivals": []}).warms_up
    return len(config.seeds) * (config.rounds if later else 1)
