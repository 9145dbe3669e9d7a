"""What a run's configuration has of the model, the data, sampling, pairs, locating, rewards and evaluation."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from allo_fast.config_train import ImplicitConfig, RewriterConfig
from allo_fast.section import Section

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
    # As data.train; the problems that `evaluate` answers. null: prompts of data.train are held out for it.
    test: str | None = None
    test_size: float | None = Field(None, gt=0, lt=1)  # fraction of its prompts that is held out; null: 0.1
    text: str | None = None  # as data.train, rows {text}: each model's perplexity of them is said, too
    format: Literal["problems", "gsm8k", "release", "multiple_choice", "preference"] = "problems"  # what a row is
    chat_template: bool | None = None  # null: where the tokenizer has one; true: it must; false: never
    chat_template_kwargs: dict[str, Any] = {}  # arguments of the chat template, as enable_thinking: false
    prompt_template: str | None = None  # "{}" is a prompt's text; null: bare in chats and preferences, else the paper's
    # Which answers are right: strict, release, math, FILE.py:FUNCTION of a response and its row, reward_model:FOLDER.
    scorer: str = "strict"
    max_prompt_tokens: int = Field(1024, gt=0)  # longer problems are set aside
    max_response_tokens: int = Field(1024, gt=0)  # longer given responses and solutions are set aside

    @model_validator(mode="after")
    def _divided(self):
        if self.test is None:
            self.test, self.test_size = self.train, self.test_size or 0.1
        elif self.test_size and self.test != self.train:
            raise ValueError("test_size: of data.train where there is no data.test; beside one set test_size: null")
        return self

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
    stop: list[str] = ["Problem:", "</s>", "Human:", "Assistant:"]  # where responses, and answers to test problems, end


class PairsConfig(Section):
    max_pairs: int = Field(5, gt=0)  # per problem, drawn at random
    # Fraction of the problems whose pairs no stage behind this one trains on, but looks at meanwhile; null: of none.
    eval_size: float | None = Field(None, gt=0, lt=1)
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
    # Of preferences: test prompts that are answered too, greedily, for a reader; not by models in ZeRO-3 shares.
    samples: int = Field(4, ge=0)
