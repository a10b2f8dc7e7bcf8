"""Overrides: a form with every setting optional, `key=value` texts, merging."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from components.settings.schema import Settings, SettingsError, load_settings
from flows.versioning.setting_overrides import (
    SettingsOverrides,
    chosen,
    merged,
    parse_assignments,
    read_params,
)


def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    names = set()
    for name, field in model.model_fields.items():
        optional = get_origin(field.annotation) in {Union, UnionType}
        kinds = get_args(field.annotation) if optional else (field.annotation,)
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        names |= leaves(section, f"{prefix}{name}.") if section else {prefix + name}
    return names


def test_the_form_has_every_setting_and_requires_none() -> None:
    assert leaves(SettingsOverrides) == leaves(Settings)
    assert chosen(SettingsOverrides()) == {}
    schema = SettingsOverrides.model_json_schema()
    assert "required" not in schema
    runtime = schema["$defs"]["RuntimeOverrides"]["properties"]["workers"]
    assert runtime["description"].startswith("Worker processes of the corpus engine")
    assert {"minimum": 1, "type": "integer"} in runtime["anyOf"]


def test_only_what_was_set_is_chosen_and_null_counts(root: Path) -> None:
    form = SettingsOverrides.model_validate(
        {"dit_stage1": {"steps": 3}, "runtime": {"rendezvous_endpoint": None}, "vae": {}}
    )
    assert chosen(form) == {"dit_stage1": {"steps": 3}, "runtime": {"rendezvous_endpoint": None}}
    values = merged(read_params(root), chosen(form))
    before = read_params(root)
    assert values["dit_stage1"].pop("steps") == 3
    before["dit_stage1"].pop("steps")
    assert values == before


def test_the_whole_of_params_yaml_passes_through_the_form(root: Path) -> None:
    params = read_params(root)
    again = chosen(SettingsOverrides.model_validate(params))
    assert merged(params, again) == params
    assert load_settings(root / "params.yaml") == Settings.model_validate(again)


def test_assignments_are_yaml_values_at_dotted_places() -> None:
    found = parse_assignments(
        ["vae.steps=4", "vae.batch_size=2", "generate.sizes=[[128, 96]]", "project.name=a=b"]
    )
    assert found == {
        "vae": {"steps": 4, "batch_size": 2},
        "generate": {"sizes": [[128, 96]]},
        "project": {"name": "a=b"},
    }


@pytest.mark.parametrize(
    ("assignment", "said"),
    [("vae.steps", "expected"), ("=4", "expected"), ("a=[1", "not valid YAML")],
)
def test_a_malformed_assignment_is_named(assignment: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse_assignments([assignment])


def test_unknown_keys_and_values_out_of_range_are_refused(root: Path) -> None:
    with pytest.raises(ValidationError, match="stepz"):
        SettingsOverrides.model_validate({"vae": {"stepz": 3}})
    with pytest.raises(ValidationError, match="greater than or equal"):
        SettingsOverrides.model_validate({"runtime": {"workers": 0}})
    with pytest.raises(SettingsError, match="did you mean 'steps'"):
        merged(read_params(root), {"vae": {"stepz": 3}})
