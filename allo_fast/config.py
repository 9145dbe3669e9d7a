"""Every key of a run's configuration, in small typed classes; those of its sections stand in config_sections.py and
config_train.py. config_file.py reads all from YAML.

Names are those of transformers' TrainingArguments and TRL's DPOConfig where one exists. Defaults are
the paper's, where it says one.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from allo_fast.config_sections import (
    GRADIENT_SCORES,
    REWRITING,
    SAMPLED,
    DataConfig,
    EvaluateConfig,
    LocateConfig,
    ModelConfig,
    PairsConfig,
    RewardsConfig,
    SampleConfig,
)
from allo_fast.config_train import ForgetConfig, LearnConfig, PretrainConfig, SftConfig, TrainConfig, WarmupConfig
from allo_fast.config_train import PreferenceTrainConfig as PreferenceTrainConfig
from allo_fast.config_train import SparseTrainConfig as SparseTrainConfig
from allo_fast.errors import UserError as UserError  # for whoever reads a configuration
from allo_fast.errors import first_line as first_line
from allo_fast.section import LARGEST, Section


class Config(Section):
    name: str  # the run's folder is output_dir/name; of at most 200 bytes, without / and \
    output_dir: str = "runs"  # on several nodes: a folder that all of them see
    deepspeed: str | None = None  # DeepSpeed JSON, or auto; null: one process without DeepSpeed
    ddp_timeout: float = Field(1800, gt=0, le=1e6)  # seconds that a rank waits for the others
    seeds: list[Annotated[int, Field(ge=0, le=LARGEST)]] = Field([0], min_length=1)  # stages run for each
    protocol: Literal["paper", "release"] = "paper"  # release: the published code's, where that is another
    # Log-probabilities by the reference. cached: computed once, and kept in the run's folder for all stages and seeds;
    # online: in every step. Dense training and other reference models know only cached.
    reference: Literal["cached", "online"] = "cached"
    # allo; sparse-dpo: DPO on the located weights, without rewards and forgetting; dpo: on all weights (`warmup`).
    method: Literal["allo", "sparse-dpo", "dpo"] = "allo"
    rivals: list[Literal["dpo"]] = []  # trained and evaluated beside the method
    # Of sampling, locating, forgetting and learning; the base of the next one is the model that the last one made.
    rounds: int = Field(1, gt=0)
    # Of which sparse stages whole models are written beside their deltas; `allo-fast export` makes them afterwards too.
    # Of `sft` always, with none too: its model is the base of all that follows.
    save_models: Literal["final", "all", "none"] = "final"
    # What shows curves of training while it goes on; tensorboard's are in the run's folder. Both are to be installed.
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig = PretrainConfig()
    data: DataConfig
    sft: SftConfig | None = None  # supervised fine-tuning of the base before all else; {}: with defaults, null: none
    sample: SampleConfig = SampleConfig()
    pairs: PairsConfig = PairsConfig()
    warmup: WarmupConfig = WarmupConfig()
    locate: LocateConfig = LocateConfig()
    rewards: RewardsConfig = RewardsConfig()
    forget: ForgetConfig = ForgetConfig()
    learn: LearnConfig = LearnConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or {*name} & {*"/\\"} or not name.isprintable() or len(name.encode()) > 200:
            raise ValueError("expected the name of one folder in output_dir, of at most 200 bytes, without / and \\")
        return name

    @model_validator(mode="after")
    def _consistent(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: each only once, got {self.seeds}")
        if (self.rewards.source == "file") != (self.rewards.path is not None):
            raise ValueError("rewards.path goes with rewards.source: file, and only with it")
        if self.model.name_or_path is None and not all(
            source.startswith("arithmetic:") for source in (self.data.train, self.data.test)
        ):
            raise ValueError("model.name_or_path: which model? Without one a tiny one is trained, on arithmetic alone")
        if self.sample.engine == "server" and (self.sft or not self.model.name_or_path or not self.sample.server.url):
            raise ValueError("sample.engine: server needs sample.server.url, model.name_or_path as its model, no sft")
        if self.sample.engine == "server" and self.data.format in ("multiple_choice", "preference"):
            raise ValueError(
                f"sample.engine: server: data.format: {self.data.format} has its responses, none is sampled"
            )
        if self.warmup.lora and self.located_by == "delta" and self.method != "dpo":
            raise ValueError(
                "warmup.lora: adapters change all weights at once, and locate none; delta needs lora: null"
            )
        if self.rounds > 1 and self.data.format in ("multiple_choice", "preference"):
            raise ValueError(f"rounds: data.format: {self.data.format} has its responses, no round samples others")
        if self.rounds > 1 and self.method == "allo" and self.rewards.source == "file":
            raise ValueError("rounds: rewards.source: file has rewards of the first round's responses alone")
        if self.rounds > 1 and self.locate.after:
            raise ValueError("rounds: locate.after ranks by a change of the first round's base alone")
        if self.rounds > 1 and self.sample.engine == "server":
            raise ValueError("rounds: sample.engine: server samples from the first round's base alone")
        if self.rounds > 1 and self.method != "dpo" and self.save_models == "none":
            raise ValueError("rounds: the next one begins from the model of this one; save_models: final keeps it")
        if self.warmup.lora and self.deepspeed:
            raise ValueError("warmup.lora: needs one process without deepspeed")
        if self.rewards.model and self.rewards.source == "file":
            raise ValueError("rewards.model: with rewards.source: file no model is asked")
        if self.deepspeed and (self.protocol == "release" or "all" in (self.forget.clip, self.learn.clip)):
            raise ValueError("deepspeed: protocol: release and clip: all need one process without it")
        if self.deepspeed and self.model.device != "auto":
            raise ValueError(f"model.device: {self.model.device}; with deepspeed each rank has its own: leave it auto")
        ratios = [self.learn.ratio, *([self.forget.ratio] if self.method == "allo" else [])]
        if self.locate.skip + max(ratios) > 1:
            raise ValueError("locate.skip plus a stage's ratio is more than 1")
        if self.locate.after and self.locate.score:
            raise ValueError("locate.after takes the place of locate.score: set one of them")
        if self.protocol == "release" and self.located_by not in ("delta", "after"):
            raise ValueError(f"locate.score: protocol: release has delta alone, got {self.locate.score}")
        if self.protocol == "release" and self.learn.max_tokens_per_batch:
            raise ValueError("learn.max_tokens_per_batch: protocol: release counts key tokens by the micro-batch")
        for train in (self.warmup, self.learn):
            if train.watches and not self.pairs.eval_size:
                keys = "early_stopping_patience and load_best_model_at_end"
                raise ValueError(f"{train.section}: {keys} look at pairs that do not train: set pairs.eval_size")
            losses, weights = train.loss_type, train.loss_weights
            if len({*losses}) < len(losses):
                raise ValueError(f"{train.section}.loss_type: each only once, got {losses}")
            if weights is not None and len(weights) != len(losses):
                expected = f"expected {len(losses)}, one for each loss, got {len(weights)}"
                raise ValueError(f"{train.section}.loss_weights: {expected}")
            if self.protocol == "release" and (train.losses != (("sigmoid", 1.0),) or train.length_alpha):
                raise ValueError(f"{train.section}.loss_type: protocol: release has sigmoid alone, with weight 1")
        if self.method != "dpo" and not self.learn.needs_reference and self.epsilon < 1:
            name = ", ".join(self.learn.loss_type)
            raise ValueError(f"learn.epsilon: a reference decides what is key, loss_type: {name} has none; set it to 1")
        for key in ("last", "rows", "scope"):
            if self.protocol == "release" and getattr(self.locate, key) not in (False, "global"):
                raise ValueError(f"locate.{key}: protocol: release ranks single weights, all together, by the highest")
        for key, train in self.located_sections.items():
            if self.locate.pairs and self.locate.pairs < train.examples_per_step:
                expected = f"expected at least the {train.examples_per_step} of a step of {key}"
                raise ValueError(f"locate.pairs: {expected}, got {self.locate.pairs}")
        return self

    @property
    def located_by(self) -> str:
        """What ranks the weights: a score, or `after` for another model's change."""
        if self.locate.after:
            return "after"
        return self.locate.score or ("delta" if self.protocol == "release" else "linear")

    @property
    def located_sections(self) -> dict[str, TrainConfig]:
        """Those by whose steps gradients rank the weights, by key."""
        rewards = self.rewards
        sections = {
            "warmup": (self.warmup, self.method != "dpo" and self.located_by in GRADIENT_SCORES),
            "rewards.train": (rewards.train, self.reward_source == "rewriter" and rewards.ratio < 1),
            "rewards.dpo": (rewards.dpo, self.reward_source == "implicit"),
        }
        names = sections if self.method == "allo" else ["warmup"]
        fine_tuned = {"sft": self.sft} if self.sft and self.sft.ratio < 1 else {}
        return fine_tuned | {name: sections[name][0] for name in names if sections[name][1]}

    @property
    def warms_up(self) -> bool:
        """Whether the dense warm-up runs: as the result, as a rival, or for what it changes."""
        return "dpo" in self.trained or self.located_by == "delta"

    @property
    def trained(self) -> list[str]:
        """What the run aligns and compares with the base: the rivals, then the method."""
        return [*dict.fromkeys([*self.rivals, self.method])]

    def keeps_model(self, stage: str) -> bool:
        """Whether a sparse stage writes its whole model beside its delta."""
        return stage == "sft" or self.save_models == "all" or (self.save_models == "final" and stage == "learn")

    @property
    def reward_source(self) -> str:
        return self.rewards.source or ("confidence" if self.data.format == "preference" else "rewriter")

    @property
    def generates_answers(self) -> bool:
        """Whether evaluation judges texts of the model's own."""
        return generates_answers(self.data.format, self.evaluate.choices)

    @property
    def reads_solutions(self) -> bool:
        """Whether a stage trains on gold solutions, or shows them."""
        return self.sft is not None or (self.method == "allo" and self.reward_source in REWRITING)

    @property
    def epsilon(self) -> float:
        """Of learning: the fraction of each rejected response's tokens that are key tokens."""
        return self.learn.epsilon or (1.0 if self.method == "sparse-dpo" else 0.1)


def generates_answers(format: str, choices: str) -> bool:
    """By `data.format` and `evaluate.choices`."""
    return format in SAMPLED or (format, choices) == ("multiple_choice", "generation")
