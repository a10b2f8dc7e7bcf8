"""Base of every settings section, and the bounded types that sections share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
# A YAML list is the only way to write a tuple, so these fields alone accept list -> tuple.
HeightWidth = Annotated[tuple[Count, Count], Strict(False)]
Ints = Annotated[tuple[Count, ...], Strict(False)]


class Effect(Enum):
    """What a setting of a training run can do to the weights, where that is not the usual: all."""

    NONE = "none"
    """Nothing: it decides what is looked at, kept or said, and how fast, never what is computed."""
    CONTENT = "content"
    """It names a file or folder, and what lies there counts, not where."""


CHANGES_NO_WEIGHT = Effect.NONE
CONTENT_COUNTS = Effect.CONTENT


class Section(BaseModel):
    """Base of every section: immutable, finite, no unknown keys, no silent type coercion."""

    # The sentence below a field is also its description in the schema that forms are made of.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    ordered: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of fields of which the first must not exceed the second."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for low, high in self.ordered:
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                raise ValueError(f"{low} {least:g} must not exceed {high} {most:g}")
        return self
