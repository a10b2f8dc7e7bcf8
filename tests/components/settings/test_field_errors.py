"""One line of what pydantic refuses."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from components.settings.field_errors import first_error


class Leaf(BaseModel):
    kind: int

    @field_validator("kind")
    @classmethod
    def _no_seven(cls, value: int) -> int:
        if value == 7:
            raise ValueError("Seven is 'Taken'")
        return value


class Tree(BaseModel):
    leaves: list[Leaf]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"leaves": [{}]}, "leaves.0.kind: field required"),
        ({"leaves": [{"kind": 7}]}, "leaves.0.kind: seven is 'Taken'"),
        ("secret", "tree: input should be a valid dictionary or instance of Tree"),
    ],
)
def test_the_first_error_names_its_field_and_keeps_values_to_itself(
    values: object, line: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        Tree.model_validate(values)
    assert first_error(caught.value, whole="tree") == line
