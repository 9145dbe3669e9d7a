"""Every key of the configuration, in small typed classes; config_file.py reads them from YAML.

Names are those of transformers' TrainingArguments and TRL's DPOConfig where one exists. Defaults are the paper's.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from allo_fast.config_train import (
    ForgetConfig,
    ImplicitConfig,
    LearnConfig,
    PretrainConfig,
    RewriterConfig,
    SftConfig,
    TrainConfig,
    WarmupConfig,
)
from allo_fast.config_train import PreferenceTrainConfig as PreferenceTrainConfig
from allo_fast.config_train import SparseTrainConfig as SparseTrainConfig
from allo_fast.errors import UserError as UserError  # for whoever reads a configuration
from allo_fast.errors import first_line as first_line
from allo_fast.section import LARGEST, Section

SAMPLED = ("problems", "gsm8k", "release")  # the formats whose responses are sampled and answers generated
REWRITING = ("rewriter", "prompted")  # sources of rewards that show gold solutions, in prompts of their own
SCORERS, OWN_SCORER, REWARD_MODEL = ("strict", "release", "math"), r".+\.py:\w+", "reward_model:"
GRADIENT_SCORES = ("linear", "snr", "grad_sum", "fisher")
Score = Literal["linear", "snr", "grad_sum", "fisher", "magnitude", "random", "delta"]
RewardSource = Literal["rewriter", "confidence", "implicit", "prompted", "file"]


class ModelConfig(Section):
    name_or_path: str | None = None  # local folder or hub id; null: the project pretrains a tiny Llama (`pretrain`)
    # Of the frozen base; the warm-up trains in float32. auto: bfloat16 where the device has matrix units for it (from
    # CUDA 8.0 on, AMX), else float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"  # auto: cuda where there is one, else cpu
    attn_implementation: str | None = None  # sdpa, eager, flash_attention_2, ...; null: transformers' choice
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    # Of a selection's values, into a bfloat16 base; stochastic: by chance, in the mean the value itself, so that what
    # is smaller than bfloat16 can show counts too. A float32 base takes the values as they are, whichever is set.
    rounding: Literal["nearest", "stochastic"] = "nearest"

    @model_validator(mode="after")
    def _chosen(self):
        if self.dtype == "auto":
            from allo_fast.device import best_dtype  # which takes torch

            self.dtype = best_dtype(self.device)
        return self


class DataConfig(Section):
    # A file, a saved data set, org/name:config:split, arithmetic:train, reasoning_gym:TASK; and a slice: x.jsonl[:9]
    train: str
    test: str  # as data.train; the problems that `evaluate` answers
    text: str | None = None  # as data.train, rows {text}: each model's perplexity of them is said, too
    format: Literal["problems", "gsm8k", "release", "multiple_choice", "preference"] = "problems"  # what a row is
    chat_template: bool | None = None  # null: where the tokenizer has one; true: it must; false: never
    chat_template_kwargs: dict[str, Any] = {}  # arguments of the chat template, as enable_thinking: false
    prompt_template: str | None = None  # "{}" is the problem; null: bare in chats and preferences, else the paper's
    # Which answers are right: strict, release, math, FILE.py:FUNCTION of a response and its row, reward_model:FOLDER.
    scorer: str = "strict"
    max_prompt_tokens: int = Field(1024, gt=0)  # longer problems are set aside
    max_response_tokens: int = Field(1024, gt=0)  # longer given responses and solutions are set aside

    @field_validator("scorer")
    @classmethod
    def _known(cls, scorer: str) -> str:
        if scorer not in SCORERS and not re.fullmatch(f"{OWN_SCORER}|{REWARD_MODEL}.+", scorer):
            raise ValueError(f"expected {', '.join(SCORERS)}, FILE.py:FUNCTION or {REWARD_MODEL}FOLDER")
        return scorer


class ServerConfig(Section):
    url: str | None = Field(None, pattern="^https?://")  # of an API like OpenAI's, as http://localhost:8000/v1
    model: str | None = None  # what the server calls the base; null: model.name_or_path
    api_key_env: str | None = None  # the environment variable that holds the key; null: none is sent
    concurrency: int = Field(16, gt=0)  # requests at once, of each rank
    timeout: float = Field(600, gt=0, le=1e6)  # seconds that an answer, of all responses to a problem, may take
    retries: int = Field(6, ge=0)  # of a request, after 1, 2, 4, ... seconds


class SampleConfig(Section):
    num_return_sequences: int = Field(10, gt=0)  # responses per problem
    temperature: float = Field(0.7, gt=0)  # of sampling
    top_p: float = Field(0.95, gt=0, le=1)  # probability that sampling draws from
    max_new_tokens: int = Field(1024, gt=0)  # of a response; with its prompt within the model's positions
    batch_size: int = Field(8, gt=0)  # problems whose responses are computed at once; decides no text, to rounding
    engine: Literal["local", "server"] = "local"  # what samples: this process, or `server`, which has the same model
    server: ServerConfig = ServerConfig()
    stop: list[str] = ["Problem:", "</s>", "Human:", "Assistant:"]  # a response is cut at the first of these


class PairsConfig(Section):
    max_pairs: int = Field(5, gt=0)  # per problem, drawn at random
    gold: Literal["never", "missing"] = "never"  # missing: the gold solution stands in where no response is correct


class LocateConfig(Section):
    score: Score | None = None  # what ranks the weights; null: linear, with protocol: release delta
    after: str | None = None  # folder or hub id: rank by what changed from the base to this model instead
    # Pairs that gradients are taken of, drawn at random; of sft and a rewriter, which locate for themselves, examples.
    pairs: int | None = Field(None, gt=0)  # null: all
    clip: bool = True  # linear: scale each step's gradient down to warmup.max_grad_norm, as training would
    windows: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"  # parts of the weights, for each a pass
    accumulators: Literal["device", "host"] = "device"  # where sums of gradients lie
    scope: Literal["global", "per_tensor"] = "global"  # all weights compete, or those of each tensor among themselves
    exclude: list[str] = []  # tensors never selected, as shell patterns: "*embed_tokens*"
    skip: float = Field(0.0, ge=0, lt=1)  # fraction of the highest passed over first (the band of the ablation)
    last: bool = False  # the lowest instead of the highest (the ablation)
    # Whole rows of each weight as it is stored, by their mean score; of linear layers, where a row makes one output,
    # only their gradient is computed then.
    rows: bool = False


class RewardsConfig(Section):
    source: RewardSource | None = None  # null: rewriter, for preference data confidence
    path: str | None = None  # source: file: JSON lines {prompt, response, rewards: one number per token}
    model: str | None = None  # what rewrites or is confident; null: the base model
    ratio: float = Field(0.05, gt=0, le=1)  # fraction of the weights that train; 1 of a rewriter: dense
    template: str | None = None  # three "{}": problem, solution, response; null: the paper's
    batch_size: int = Field(8, gt=0)  # responses per forward pass when a rewriter, prompted or implicit model scores
    max_examples: int | None = Field(None, gt=0)  # corrections to train on, drawn at random; null: all
    train: RewriterConfig = RewriterConfig()  # of source: rewriter
    dpo: ImplicitConfig = ImplicitConfig()  # of source: implicit


class EvaluateConfig(Section):
    max_new_tokens: int = Field(512, gt=0)  # of an answer
    choices: Literal["likelihood", "generation"] = "likelihood"  # how multiple choice is answered
    # Answers to each problem. 1: greedy; more: sampled, accuracy is pass@1, and pass@k and maj@k stand beside it.
    num_return_sequences: int = Field(1, gt=0)
    temperature: float = Field(0.7, gt=0)  # of sampling
    top_p: float = Field(0.95, gt=0, le=1)  # probability that sampling draws from
    batch_size: int = Field(16, gt=0)  # problems whose options, or answers, are computed at once


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
        chosen = self.data.format == "multiple_choice" and self.evaluate.choices == "generation"
        return chosen or self.data.format in SAMPLED

    @property
    def reads_solutions(self) -> bool:
        """Whether a stage trains on gold solutions, or shows them."""
        return self.sft is not None or (self.method == "allo" and self.reward_source in REWRITING)

    @property
    def epsilon(self) -> float:
        """Of learning: the fraction of each rejected response's tokens that are key tokens."""
        return self.learn.epsilon or (1.0 if self.method == "sparse-dpo" else 0.1)
