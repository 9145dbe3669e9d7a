"""What every section of the configuration has: strict keys, finite numbers, whole ones within 32 bits."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST = 2**31 - 1  # that a whole number may be


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_word_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        allowed = {*_types(cls.model_fields[info.field_name].annotation)}
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) for item in items) and bool not in allowed and allowed & {int, float}:
            raise ValueError("expected a number")
        return value

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"expected at most {LARGEST}")
        return value


def _types(annotation: Any) -> Iterator[Any]:
    """Of a field, and within lists and the like."""
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)
