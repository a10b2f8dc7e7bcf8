"""Settings of the shipped profiles."""

from __future__ import annotations

import pytest
import yaml

from components.settings.schema import Settings, parse_settings
from flows.versioning.profiles import compose


@pytest.fixture
def profile(root):
    def load(name: str, **changes: object) -> Settings:
        values = yaml.safe_load(compose(root, name))
        for path, value in changes.items():
            *sections, key = path.split("__")
            place = values
            for section in sections:
                place = place[section]
            place[key] = value
        return parse_settings(values)

    return load
