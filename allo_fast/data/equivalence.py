"""Whether two answers are mathematically the same, by math-verify, which parses and never runs them."""

from allo_fast.config import UserError


def require() -> None:
    """Raises UserError where math-verify is not installed."""
    try:
        import math_verify  # noqa: F401  whether it is there
    except ImportError:
        raise UserError("data.scorer: math needs math-verify: pip install math-verify") from None


def is_equivalent(text: str, answer: str) -> bool:
    """Whether the last expression in `text`, LaTeX or plain, equals that in `answer`; False where one has none.

    Numbers, fractions, percentages, sets, intervals, equations; what takes longer than seconds is not the same.
    """
    require()
    from math_verify import parse, verify

    # A gold answer is an expression as a whole; a response has one where it says so, or writes LaTeX.
    gold = parse(f"${answer}$") or parse(answer)
    return bool(gold) and verify(gold, parse(f"${text}$" if "\\" in text and "$" not in text else text))
