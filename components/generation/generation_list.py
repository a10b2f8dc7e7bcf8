"""The list of pictures that `sampling.write_generations` left, a JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_generations(listed: Path) -> list[dict[str, Any]]:
    """Lines of a list that `sampling.write_generations` wrote; none where there is no such file."""
    if not listed.exists():
        return []
    # Only "\n" ends a line: splitlines() would also split at separators inside a prompt.
    lines = listed.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
