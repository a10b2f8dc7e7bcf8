"""JSON from strangers."""

from __future__ import annotations

import json
from typing import Any

from components.corpus.sources.records.separated_values import headings


def parse_json(text: str) -> Any:
    """JSON from untrusted text.

    Raises:
        ValueError: not JSON, numbers too long, nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as problem:
        # Without the position and the text: lines of strangers do not belong in a table of losses.
        raise ValueError(f"not JSON: {problem.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        # Python's own words advise to change the interpreter.
        raise ValueError("a number with too many digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A repeated key gets its number, as a repeated heading does; plain JSON keeps the last."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = headings([name for name, _ in pairs])
    return dict(zip(names, (value for _, value in pairs), strict=True))
