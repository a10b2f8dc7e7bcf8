"""Where a submitted run with settings of its own works: a tree under `runs/submitted/`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.settings.yaml_files import parse_yaml
from flows.records.trees import SUBMITTED, tree_place
from flows.running.working_trees import settings_tree
from flows.versioning.profiles import compose
from flows.versioning.setting_overrides import merged, read_params

DIGITS = 12


def submitted_tree(root: Path, overrides: Mapping[str, Any]) -> Path:
    """The working tree for `overrides`; equal settings share one, so a second run goes on there.

    Raises:
        SettingsError: an unknown key or a value that does not fit.
        TreeRefused: see `flows.running.working_trees.settings_tree`.
    """
    values = merged(read_params(root), overrides)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:DIGITS]
    return settings_tree(root, tree_place(root, SUBMITTED, digest), values)


def profile_values(root: Path, profile: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a profile of the clone, with `overrides` in their place.

    Raises:
        SettingsError: no such profile, or the result is not valid.
    """
    return merged(parse_yaml(compose(root, profile), f"profile {profile}"), overrides)
