"""The keys of the sections that train; config.py has the others."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from allo_fast.section import Section


class TrainConfig(Section):
    section: ClassVar[str] = ""  # its key
    needs_reference: ClassVar[bool] = False  # log-probabilities by a frozen model beside its own

    learning_rate: float = Field(gt=0)  # the highest of the schedule
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"  # transformers'
    warmup_steps: float = Field(0.1, ge=0)  # steps, or below 1 a fraction of all steps
    num_train_epochs: int = Field(1, gt=0)  # passes over the examples
    per_device_train_batch_size: int = Field(4, gt=0)  # examples (pairs or responses) per forward pass
    gradient_accumulation_steps: int = Field(8, gt=0)  # forward passes per optimizer step, of all ranks together
    # Of a forward pass, with the padding and repeated prompts of models that cannot pack: the step's examples, as many
    # as the two keys above say, are then cut into as many passes as that takes. Longer ones are set aside. null:
    # per_device_train_batch_size examples a pass.
    max_tokens_per_batch: int | None = Field(None, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)  # gradients are scaled down to it
    weight_decay: float = Field(0.0, ge=0)  # of the weights that train, times the learning rate
    adam_beta1: float = Field(0.9, ge=0, lt=1)  # of the gradients' mean
    adam_beta2: float = Field(0.999, ge=0, lt=1)  # of their squares' mean
    adam_epsilon: float = Field(1e-8, gt=0)  # added to the root of it
    save_steps: int = Field(50, gt=0)  # optimizer steps between checkpoints
    save_minutes: float = Field(10, gt=0)  # at most, between them
    skip_nonfinite_steps: int = Field(0, ge=0)  # steps passed over whose loss or gradient is not finite; more end it

    @property
    def examples_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class PretrainConfig(TrainConfig):
    section = "pretrain"

    learning_rate: float = Field(2e-3, gt=0)
    per_device_train_batch_size: int = Field(128, gt=0)
    gradient_accumulation_steps: int = Field(1, gt=0)
    hidden_size: int = Field(128, gt=0)  # of the tiny Llama, as those below
    intermediate_size: int = Field(352, gt=0)  # of its feed-forward layers
    num_hidden_layers: int = Field(6, gt=0)  # blocks
    num_attention_heads: int = Field(4, gt=0)  # of queries, keys and values alike
    problems: int = Field(51200, gt=0)  # generated arithmetic problems
    careless: float = Field(0.0, ge=0, le=1)  # fraction whose solution reads the first minus as a plus


class SftConfig(TrainConfig):
    section = "sft"

    learning_rate: float = Field(2e-5, gt=0)  # the usual one for all weights; a few percent bear ten times as much
    num_train_epochs: int = Field(3, gt=0)
    per_device_train_batch_size: int = Field(4, gt=0)
    gradient_accumulation_steps: int = Field(32, gt=0)
    ratio: float = Field(0.05, gt=0, le=1)  # fraction of the weights that train; 1: dense, in float32
    max_examples: int | None = Field(None, gt=0)  # right responses to train on, drawn at random; null: all


class PreferenceTrainConfig(TrainConfig):
    needs_reference: ClassVar[bool] = True

    reference: str | None = None  # folder or hub id of another reference model; null: the policy before its first step


Loss = Literal[
    "sigmoid", "robust", "hinge", "ipo", "bco_pair", "apo_zero", "sigmoid_norm", "npo", "simpo", "confpo", "orpo", "sft"
]
LOSSES = get_args(Loss)
WITHOUT_REFERENCE = ("simpo", "confpo", "orpo", "sft")


class LossConfig(PreferenceTrainConfig):
    beta: float = Field(
        0.1, gt=0
    )  # of implicit rewards; ipo's tau, orpo's lambda; those on means a token want more: simpo 2, sigmoid_norm 5
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)  # how often chosen and rejected are taken to be swapped
    # By TRL's names, one or several; method/pair_losses.py has their equations. [sigmoid, sft] is DPO + NLL on chosen.
    loss_type: list[Loss] = Field(["sigmoid"], min_length=1)
    loss_weights: list[Annotated[float, Field(gt=0)]] | None = None  # of each loss; null: 1
    simpo_gamma: float = Field(0.5, ge=0)  # of simpo and confpo: the margin that they ask for
    length_alpha: float = Field(
        0.0, ge=0
    )  # of sigmoid: R-DPO's alpha, added to the margin for each token more of the chosen
    eval_steps: int = Field(10, gt=0)  # optimizer steps between two looks at the pairs of pairs.eval_size
    # Looks in a row whose loss is not below the lowest before, after which training ends; null: it goes on.
    early_stopping_patience: int | None = Field(None, gt=0)
    load_best_model_at_end: bool = False  # training leaves the weights of the look with the lowest loss

    @field_validator("loss_type", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def watches(self) -> bool:
        """Whether what comes of it depends on pairs that do not train."""
        return self.early_stopping_patience is not None or self.load_best_model_at_end

    @property
    def losses(self) -> tuple[tuple[str, float], ...]:
        """Names and weights."""
        return tuple(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    @property
    def needs_reference(self) -> bool:
        return not {*self.loss_type} <= {*WITHOUT_REFERENCE}


class LoraSettings(Section):
    """By PEFT's names."""

    r: int = Field(16, gt=0)  # the adapters' rank
    lora_alpha: float = Field(32, gt=0)  # their products are scaled by lora_alpha / r
    target_modules: str | list[str] = "all-linear"  # the layers that have one: all but the head, or by name


class WarmupConfig(LossConfig):
    section = "warmup"

    learning_rate: float = Field(1e-6, gt=0)
    # Low-rank adapters train instead of all weights, and are merged then: the rival in memory. null: all weights.
    lora: LoraSettings | None = None


class RewriterConfig(TrainConfig):
    section = "rewards.train"

    learning_rate: float = Field(2e-5, gt=0)
    num_train_epochs: int = Field(3, gt=0)
    per_device_train_batch_size: int = Field(4, gt=0)
    gradient_accumulation_steps: int = Field(32, gt=0)


class ImplicitConfig(TrainConfig):
    section = "rewards.dpo"
    needs_reference = True

    learning_rate: float = Field(5e-6, gt=0)
    beta: float = Field(0.1, gt=0)  # of its implicit rewards, which are the tokens' rewards


class SparseTrainConfig(PreferenceTrainConfig):
    ratio: float = Field(0.05, gt=0, le=1)  # fraction of all weights that train
    clip: Literal["selected", "all"] | None = None  # whose norm is clipped; null: paper selected, release all


class GuardSettings(Section):
    max_drop: float = Field(0.5, gt=0)  # nats per token, of the responses' mean log-probability; more ends forgetting
    steps: int = Field(10, gt=0)  # between two looks
    responses: int = Field(32, gt=0)  # right ones, of as many problems, drawn at random
    # What greedy responses to eight of the problems repeat of themselves, as a share of their runs of four tokens: a
    # rise by more ends forgetting; null: none are asked for.
    max_repeated: float | None = Field(0.2, gt=0, le=1)


class ForgetConfig(SparseTrainConfig):
    section = "forget"

    learning_rate: float = Field(5e-7, gt=0)
    warmup_steps: float = Field(0.03, ge=0)
    gradient_accumulation_steps: int = Field(32, gt=0)
    beta: float = Field(0.1, gt=0)  # of NPO
    # Tokens whose reward is below it are forgotten (protocol: paper); mean: below the mean of their own response.
    threshold: Literal["mean"] | Annotated[float, Field(ge=0, le=1)] = 0.5
    guard: GuardSettings | None = GuardSettings()  # watches right responses; null, and protocol: release: none does


class LearnConfig(LossConfig, SparseTrainConfig):
    section = "learn"

    learning_rate: float = Field(5e-6, gt=0)
    gradient_accumulation_steps: int = Field(32, gt=0)
    # Fraction of each rejected response's tokens that are key tokens; null: 0.1, with method: sparse-dpo 1 (plain DPO).
    epsilon: float | None = Field(None, gt=0, le=1)
