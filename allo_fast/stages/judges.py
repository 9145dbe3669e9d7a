"""Which responses are right: judged by a rule, by a function of the user's own, or by a reward model."""

from collections.abc import Callable

from allo_fast.config import Config
from allo_fast.data import equivalence
from allo_fast.data.scoring import REWARD, judge_of, labels
from allo_fast.data.verifier import is_own, judging_model
from allo_fast.model.reward import RewardModel, check_reward_model

Labels = Callable[[list[str], dict], list[dict]]  # of the responses to a row: {correct}, and the `reward` where one is


def labels_in(config: Config) -> Labels:
    """By what `data.scorer` names, which is loaded now. What is neither right nor wrong is `correct: None`."""
    scorer = config.data.scorer
    if path := judging_model(config):
        model = RewardModel(path, config.model, config.data.prompt_template)

        def rewarded(texts: list[str], row: dict) -> list[dict]:
            rewards = [model(text, row) for text in texts]
            correct = labels(rewards, wrong=float("-inf"), right=float("inf"))
            return [{"correct": label, REWARD: reward} for label, reward in zip(correct, rewards, strict=True)]

        return rewarded
    judge = judge_of(scorer)
    return lambda texts, row: [{"correct": label} for label in labels([judge(text, row) for text in texts])]


def check_scorer(config: Config, first: dict | None) -> None:
    """What `data.scorer` names is there, and a function of the user's can judge the row `first`. Raises UserError."""
    scorer = config.data.scorer
    if not config.generates_answers:
        return
    if path := judging_model(config):
        check_reward_model(path, config.data.prompt_template, first)
    elif scorer == "math":
        equivalence.require()
    elif is_own(scorer) and first:
        judge_of(scorer)(first["solution"], first)
