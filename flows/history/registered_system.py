"""Registered models as systems under test: NAME=registry:MODEL@ALIAS, or MODEL/VERSION.

The registry names weights by their digest and says where they were; they are sampled only if they
are still the ones at that place, so a name never stands for newer weights.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from components.evaluation.suites.system import Sampling, System, SystemFailed
from components.evaluation.suites.systems import AutoencoderSystem, UltraFluxSystem, parse_system

if TYPE_CHECKING:
    from components.settings.schema import Settings
    from flows.tracking.registry import RegisteredWeights

_PREFIX = "registry:"
_VERSION = re.compile(r"(?P<model>[\w.-]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")


def find_system(text: str, root: Path, settings: Settings, sampling: Sampling) -> System:
    """The system of "NAME=SPEC"; SPEC may also name a registered model.

    A transformer is sampled with the autoencoder that has the same alias, where there is one, else
    with the one in data/vae; a registered autoencoder is one of the reconstruction suite.

    Raises:
        ValueError: see `systems.parse_system`; no registry, no such version.
        SystemFailed: the weights at its place are gone, or others.
    """
    name, _, spec = text.partition("=")
    if not spec.startswith(_PREFIX):
        return parse_system(text, root, settings, sampling)
    wanted = _VERSION.fullmatch(spec.removeprefix(_PREFIX))
    if wanted is None:
        raise ValueError(
            f"--system {text}: expected registry:MODEL@ALIAS or registry:MODEL/VERSION"
        )
    from flows.tracking.uploader import tracking_config

    system = parse_system(f"{name}=trained", root, settings, sampling)
    assert isinstance(system, UltraFluxSystem)
    names = {
        pattern.format(project=settings.project.name): kind
        for kind, pattern in tracking_config(root)["registry"].items()
    }
    known = _known(text, root)
    chosen = _chosen(text, known, wanted)
    path = _weights(root, name, chosen)
    if names.get(chosen.model) == "autoencoder":
        return AutoencoderSystem(name, path, sampling)
    companions = [
        version
        for version in known
        if names.get(version.model) == "autoencoder" and wanted["alias"] in version.aliases
    ]
    autoencoder = _weights(root, name, companions[0]) if companions else None
    return replace(system, transformer=path, autoencoder=autoencoder)


def _known(text: str, root: Path) -> list[RegisteredWeights]:
    from flows.history.run_evidence import connect
    from flows.tracking.registry import registered_weights

    client, problem = connect(root)
    if client is None:
        raise ValueError(f"--system {text}: no registry: {problem}")
    return registered_weights(client)


def _chosen(text: str, known: list[RegisteredWeights], wanted: re.Match[str]) -> RegisteredWeights:
    found = [
        version
        for version in known
        if version.model == wanted["model"]
        and (wanted["version"] in (None, version.version))
        and (wanted["alias"] is None or wanted["alias"] in version.aliases)
    ]
    if not found:
        titles = ", ".join(sorted(version.title for version in known)) or "nothing"
        raise ValueError(f"--system {text}: not registered; registered: {titles}")
    return found[0]


def _weights(root: Path, name: str, version: RegisteredWeights) -> Path:
    """The folder of a version, if it still holds that version."""
    from components.files.weight_folders import folder_digest

    path = root / version.path
    back = (
        "check out the commit that trained it, then `dvc pull` or `dvc checkout` that path "
        f"(`ultraflux lineage {version.model}/{version.version}` names the commit)"
    )
    if not path.is_dir():
        raise SystemFailed(f"{name}: {version.title}: {version.path} is not there; {back}")
    # The folder belongs to the newest run; an older version's path may hold its successor.
    digest = folder_digest(path)
    if digest != version.digest:
        raise SystemFailed(
            f"{name}: {version.title} has sha256 {version.digest[:16]}, {version.path} now has "
            f"{digest[:16]}; {back}"
        )
    return path
