"""Compose params.yaml from conf/base.yaml and one profile.

DVC's own Hydra composition works for `dvc exp run` only, so the composed file is committed and a
test keeps it in step with the profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from components.settings.schema import Settings, SettingsError, load_settings, parse_settings
from components.settings.yaml_files import NUMBER_IN_DVC, YamlRefused, read_yaml
from flows import environment

DEFAULT = "embedded"

_HEADER = """\
# Composed from conf/base.yaml and conf/profiles/{profile}.yaml by
# `ultraflux config compose --profile {profile}`. What each key means: components/settings/.
"""


class _AsDvcWrites(yaml.SafeDumper):
    """An unset value is empty text, so that `dvc exp run -S` changes no other line of the file."""


_AsDvcWrites.add_representer(
    type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "")
)
# A text that DVC would take for a number is written in quotes.
_AsDvcWrites.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER_IN_DVC, list("-+0123456789"))


def settings_text(values: Mapping[str, Any]) -> str:
    """Content of a params.yaml."""
    return yaml.dump(dict(values), Dumper=_AsDvcWrites, sort_keys=False)


def composed(root: Path, profile: str) -> dict[str, Any]:
    """Values of conf/base.yaml with those of a profile over them, not yet checked.

    Raises:
        SettingsError: no such profile, or a file of it that cannot be read.
    """
    from omegaconf import OmegaConf

    root = root if (root / "conf" / "base.yaml").is_file() else environment.CODE
    path = root / "conf" / "profiles" / f"{profile}.yaml"
    if not path.parent.is_dir():
        raise SettingsError(f"profile '{profile}': no conf/profiles here; change into a clone")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise SettingsError(f"profile '{profile}': not found; profiles: {known}")
    merged = OmegaConf.merge(_read(root / "conf" / "base.yaml"), _read(path))
    values: Any = OmegaConf.to_container(merged)
    return dict(values)


def _read(path: Path) -> Any:
    """Content of a file below conf/, for merging."""
    from omegaconf import OmegaConf

    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise SettingsError(f"{path}: not found") from None
    except YamlRefused as problem:
        raise SettingsError(str(problem)) from None
    if not isinstance(values, dict | None):
        raise SettingsError(f"{path}: expected a mapping, got {type(values).__name__}")
    return OmegaConf.create(values or {})


def settings_of(root: Path) -> Settings:
    """Settings of a project; of a folder without params.yaml, those of the default profile.

    Raises:
        SettingsError: params.yaml is not valid, or there is none and no profile is at hand.
    """
    if (root / "params.yaml").is_file():
        return load_settings(root / "params.yaml")
    return parse_settings(composed(root, DEFAULT), where=f"profile {DEFAULT}")


def derived_profile(
    root: Path,
    profile: str,
    changes: Mapping[str, Mapping[str, Any]],
    remarks: Sequence[str],
) -> str:
    """Text of a profile that is another one with some values changed.

    Args:
        root: repository root.
        profile: name of the other one.
        changes: section -> key -> value.
        remarks: lines of comment that say why.
    """
    from omegaconf import OmegaConf

    base: Any = OmegaConf.to_container(_read(root / "conf" / "profiles" / f"{profile}.yaml"))
    values = changed_values(base, changes)
    comments = "".join(f"# {' '.join(line.split())}\n" for line in remarks)
    return f"# Profile {profile} for one folder of photographs.\n{comments}{settings_text(values)}"


def changed_values(
    values: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Settings with others over them, section by section and key by key at any depth."""
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.create(dict(values)), OmegaConf.create(dict(changes)))
    plain: Any = OmegaConf.to_container(merged)
    return dict(plain)


def compose(root: Path, profile: str) -> str:
    """Text of params.yaml for a profile.

    Raises:
        SettingsError: no such profile, or its values are not valid settings.
    """
    values = composed(root, profile)
    parse_settings(values, where=f"conf/profiles/{profile}.yaml")
    return _HEADER.format(profile=profile) + settings_text(values)
