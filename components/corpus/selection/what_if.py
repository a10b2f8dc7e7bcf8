"""What another threshold would do: the rules again over the measured signals, no pixel touched."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml
from pydantic import ValidationError

from components.corpus.selection.rules import as_candidates, count_by_reason, select
from components.settings.corpus import SelectSettings
from components.settings.field_errors import field_name

_EXAMPLES = 5


class WhatIfError(ValueError):
    """A change that cannot be tried; one line."""


@dataclass(frozen=True)
class WhatIf:
    """Selection now and then."""

    now: dict[str, int]
    """`count_by_reason` of the present settings."""
    then: dict[str, int]
    gained: pd.DataFrame
    """Rows that would be kept: image_id, uri and why they are rejected now."""
    lost: pd.DataFrame
    """Rows that would be rejected: image_id, uri and why."""


def _paths() -> list[str]:
    """All keys of the settings, `human.` in front of those of the human channel."""
    human = SelectSettings.model_fields["human"].annotation
    own = [f"human.{name}" for name in getattr(human, "model_fields", {})]
    return [name for name in SelectSettings.model_fields if name != "human"] + own


def _aliases() -> dict[str, str]:
    """Every accepted spelling of a key: in full, after `select.`, or without min_ and max_."""
    known: dict[str, str] = {}
    for path in _paths():
        group, _, name = path.rpartition(".")
        short = name.removeprefix("min_").removeprefix("max_")
        shorter = short.removesuffix("_bits").removesuffix("_top_fraction")
        # `setdefault`: of two fields that share a spelling the first keeps it, in the schema's
        # order.
        for spelling in (name, short, shorter):
            full = f"{group}.{spelling}" if group else spelling
            known.setdefault(full, path)
            known.setdefault(f"select.{full}", path)
    return known


def changed_settings(settings: SelectSettings, changes: Sequence[str]) -> SelectSettings:
    """Apply `key=value` changes, values in YAML.

    Args:
        settings: present rules.
        changes: such as "entropy_bits=6.8", "human.quality=null" or "target_images=500000".

    Raises:
        WhatIfError: not key=value, an unknown key (the nearest is named), or a value out of range.
    """
    values = settings.model_dump()
    known = _aliases()
    for change in changes:
        key, separator, text = change.partition("=")
        key = key.strip()
        if not separator:
            raise WhatIfError(f"{change!r}: write KEY=VALUE, such as entropy_bits=6.8")
        if key not in known:
            # No cutoff: a name is always suggested, however wrong the key.
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise WhatIfError(f"unknown key {key!r}; did you mean {close[0]!r}?")
        try:
            # Values read as in params.yaml, so `null` switches a rule off here too.
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise WhatIfError(f"{key}: {text!r} is not a YAML value") from None
        group, _, name = known[key].rpartition(".")
        (values[group] if group else values)[name] = value
    try:
        # Through the schema: a change obeys the ranges that a settings file does.
        return SelectSettings.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        value = f"{field_name(first)} = {first['input']!r}"
        raise WhatIfError(f"{value}: {first['msg']}") from None


def _examples(rows: pd.DataFrame) -> pd.DataFrame:
    names = ["image_id", "uri", "reject_reason", "reject_value", "reject_threshold"]
    return rows[[name for name in names if name in rows]].reset_index(drop=True)


def what_if(
    selected: pd.DataFrame, settings: SelectSettings, changed: SelectSettings, seed: int
) -> WhatIf:
    """Judge every candidate under both settings.

    Args:
        selected: output of the stage `select`: `selection.COLUMNS`, uri and reject_reason.
        settings: present rules.
        changed: rules to try.
        seed: project seed.

    Raises:
        QuotaInfeasible: see `select`.
    """
    # A selected table holds verdicts; the rules want what they saw.
    candidates = as_candidates(selected)
    # Both anew: against stored verdicts a change would be blamed for settings that were edited
    # since the stage ran.
    now, then = select(candidates, settings, seed), select(candidates, changed, seed)
    # Row by row: both tables are copies of one, in its order.
    gained = then["kept"] & ~now["kept"]
    lost = now["kept"] & ~then["kept"]
    return WhatIf(
        count_by_reason(now), count_by_reason(then), _examples(now[gained]), _examples(then[lost])
    )


def to_json(found: WhatIf, changes: Sequence[str]) -> Mapping[str, Any]:
    """Counts and first examples as plain values."""

    def listed(table: pd.DataFrame) -> list[dict[str, Any]]:
        head = table.head(_EXAMPLES).astype(object)
        # As objects, where None can stand: JSON has no NaN.
        rows = head.where(head.notna(), None).to_dict("records")
        return [{str(name): value for name, value in row.items()} for row in rows]

    return {
        "changes": list(changes),
        "now": found.now,
        "then": found.then,
        "gained": len(found.gained),
        "lost": len(found.lost),
        "gained_examples": listed(found.gained),
        "lost_examples": listed(found.lost),
    }
