"""Settings of the shipped profiles."""

from __future__ import annotations

import copy
import functools

import pytest
import yaml

from components.settings.schema import Settings, parse_settings
from flows.versioning.profiles import compose


@pytest.fixture(scope="session")
def profile(root):
    composed = functools.cache(lambda name: yaml.safe_load(compose(root, name)))

    def load(name: str, **changes: object) -> Settings:
        values = copy.deepcopy(composed(name))
        for path, value in changes.items():
            *sections, key = path.split("__")
            place = values
            for section in sections:
                place = place[section]
            place[key] = value
        return parse_settings(values)

    return load
