"""JSON from strangers."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """JSON from untrusted text.

    Raises:
        ValueError: not JSON, numbers too long, nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        # Without the position and the text: lines of strangers do not belong in a table of losses.
        raise ValueError(f"not JSON: {problem.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
