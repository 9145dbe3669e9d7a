"""What every section of the configuration has: strict keys, finite numbers, whole ones within 32 bits."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

LARGEST = 2**31 - 1  # that a whole number may be


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"expected at most {LARGEST}")
        return value
