"""Settings that replace single values of params.yaml: as a typed form, and as `key=value`.

`SettingsOverrides` has every section and field of `schema.Settings`, all optional: a
deployment that takes it as a parameter shows the whole settings schema in the Prefect UI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from components.settings.schema import Settings, SettingsError, parse_settings
from components.settings.yaml_files import YamlRefused, parse_yaml, read_yaml


def overrides_model(model: type[BaseModel]) -> type[BaseModel]:
    """`model` with every field optional, sections included.

    Bounds and choices of the fields stay; rules between fields are left to `parse_settings` on the
    merged values.
    """
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = overrides_model(kind)
        elif field.metadata:
            kind = Annotated[(kind, *field.metadata)]
        fields[name] = (kind | None, Field(default=None, description=field.description))
    documentation = (model.__doc__ or model.__name__).strip().splitlines()[0]
    return create_model(
        (model.__name__.removesuffix("Settings") or "Settings") + "Overrides",
        __config__=ConfigDict(extra="forbid"),
        __doc__=documentation,
        **fields,
    )


if TYPE_CHECKING:
    SettingsOverrides = Settings
else:
    SettingsOverrides = overrides_model(Settings)


def chosen(overrides: BaseModel | None) -> dict[str, Any]:
    """The values that somebody set, nested by section; null counts as set."""
    if overrides is None:
        return {}
    values = overrides.model_dump(mode="json", exclude_unset=True)
    return {name: section for name, section in values.items() if section}


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested `values` with those of `overrides` in their place.

    Raises:
        SettingsError: an unknown key or a value that does not fit.
    """
    result = _merged(values, overrides)
    parse_settings(result, where="settings")
    return result


def _merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, value in overrides.items():
        known = result.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(known, value) if both else value  # type: ignore[arg-type]
    return result


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Nested values of `section.key=value` texts; values are YAML.

    Raises:
        SettingsError: a text without `=` or with a value that is not YAML.
    """
    result: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise SettingsError(f"-S {assignment}: expected section.key=value")
        try:
            value: Any = parse_yaml(text, f"-S {assignment}")
        except YamlRefused as problem:
            raise SettingsError(str(problem)) from None
        for part in reversed(name.split(".")):
            value = {part: value}
        result = _merged(result, value)
    return result


def read_params(root: Path) -> dict[str, Any]:
    """`params.yaml` as nested values.

    Raises:
        FileNotFoundError: it is not there.
        YamlRefused: as `read_yaml`, or it holds no sections.
    """
    path = root / "params.yaml"
    values = read_yaml(path)
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise YamlRefused(f"{path}: expected a mapping of sections, got {kind}")
    return values
