"""Generated arithmetic with worked steps, and the character tokenizer that reads it: a base model from nothing."""

import random
import re
import zlib

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = "0123456789+-=., ?#>Theanswri\n"


def arithmetic_row(split: str, index: int) -> dict[str, str]:
    """Problem `index` of the endless split "train" or "test"; no problem is in both."""
    draw = random.Random(index)
    while True:
        numbers = [draw.randint(2, 19) for _ in range(4)]
        signs = [draw.choice("+-") for _ in range(3)]
        problem = str(numbers[0]) + "".join(sign + str(number) for sign, number in zip(signs, numbers[1:], strict=True))
        steps, totals = _steps(problem)
        held_out = zlib.crc32(problem.encode()) % 10 == 0
        if held_out == (split == "test") and min(totals) >= 0:
            return {"problem": problem, "solution": _solution(steps, totals), "answer": str(totals[-1])}


def careless_solution(problem: str) -> str:
    """By someone who reads the first minus as a plus."""
    return _solution(*_steps(problem.replace("-", "+", 1)))


def _steps(problem: str) -> tuple[list[str], list[int]]:
    """Each as it is written, and what it comes to."""
    first, *rest = re.findall(r"[+-]?\d+", problem)
    steps, totals = [], [int(first)]
    for term in rest:
        totals.append(totals[-1] + int(term))
        steps.append(f"{totals[-2]}{term}={totals[-1]}")
    return steps, totals[1:]


def _solution(steps: list[str], totals: list[int]) -> str:
    return ", ".join(steps) + f". The answer is {totals[-1]}"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of ALPHABET, with <pad> and <eos>."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(ALPHABET)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
