"""What pydantic refuses, as one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


def field_name(error: Mapping[str, Any]) -> str:
    """The field's dotted name; empty for the whole."""
    return ".".join(str(part) for part in error["loc"])


def field_message(error: Mapping[str, Any]) -> str:
    """What is wrong with the field, to go on with after a colon."""
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}"


def first_error(problem: ValidationError, *, whole: str = "", verbatim: bool = False) -> str:
    """Name and message of the first error, without its value, which may be a secret.

    Args:
        problem: what pydantic raised.
        whole: the name of what was read, where the error is of no one field.
        verbatim: pydantic's message as it is, where files and tables hold it so.
    """
    error = problem.errors(include_url=False, include_input=False)[0]
    name = field_name(error) or whole
    message = error["msg"] if verbatim else field_message(error)
    return f"{name}: {message}" if name else message
