"""The MLflow model registry: versions that point at DVC-tracked weights, and their aliases.

Weights stay in DVC; a version carries the content digest, the path and the run, so it can be traced
and fetched. Registering the same digest again returns the version that exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.tracking.logged_models import DIGEST_TAG, PATH_TAG, LoggedModels, describe

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

RETIRED_TAG = "ultraflux.retired"
"""On a version whose data was withdrawn: why."""


@dataclass(frozen=True)
class Promotion:
    """One model that a gate has judged."""

    model: str
    """Registered model name."""
    path: str
    """Folder of the weights, relative to the repository root."""
    digest: str
    """sha256 of the folder."""
    alias: str | None
    """Alias to give; None when the gate refused."""
    tags: dict[str, str] = field(default_factory=dict)


def _version_with_digest(client: MlflowClient, promotion: Promotion) -> ModelVersion | None:
    found = client.search_model_versions(f"name='{promotion.model}'")
    same = [v for v in found if (v.tags or {}).get(DIGEST_TAG) == promotion.digest]
    # Two uploaders may have registered the same weights; the newest has the alias.
    return max(same, key=lambda version: int(version.version)) if same else None


def register(
    client: MlflowClient,
    experiment_id: str,
    run_id: str | None,
    promotion: Promotion,
    *,
    root: Path | None = None,
) -> ModelVersion:
    """Register a model version and set its alias; both idempotent.

    Args:
        client: MLflow client.
        experiment_id: where the logged model stands.
        run_id: the run that judged it.
        promotion: what to register.
        root: the clone that has the weights: the version gets their signature.

    Returns:
        The version that now holds these weights.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(promotion.model)
    except MlflowException as problem:
        if problem.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = _version_with_digest(client, promotion)
    if version is None:
        tags: dict[str, Any] = {
            **promotion.tags,
            DIGEST_TAG: promotion.digest,
            PATH_TAG: promotion.path,
        }
        # The export of the run that trained these weights, with its curves; weights that came from
        # elsewhere have none.
        place = Path() if root is None else root
        logged = LoggedModels(client, experiment_id, place).with_digest(promotion.digest)
        if logged is None:
            logged = client.create_logged_model(
                experiment_id, name=promotion.model, source_run_id=run_id, tags=tags
            )
            describe(client, logged, None if root is None else root / promotion.path)
            client.finalize_logged_model(logged.model_id, "READY")
        version = client.create_model_version(
            promotion.model,
            source=f"models:/{logged.model_id}",
            run_id=run_id,
            tags=tags,
            model_id=logged.model_id,
        )
    if promotion.alias is not None:
        client.set_registered_model_alias(promotion.model, promotion.alias, version.version)
    return version


def retire(client: MlflowClient, known: RegisteredWeights, why: str) -> None:
    """Take every alias from a version and say on it why; nothing is deleted.

    Args:
        client: MLflow client.
        known: of `registered_weights`, with a version number.
        why: one line, in the version's description and its tag.
    """
    for alias in known.aliases:
        client.delete_registered_model_alias(known.model, alias)
    client.set_model_version_tag(known.model, known.version, RETIRED_TAG, why)
    client.update_model_version(known.model, known.version, description=f"Retired: {why}")


@dataclass(frozen=True)
class RegisteredWeights:
    """A model version and the weights that it stands for."""

    model: str
    version: str
    """Empty where only a local record tells of it."""
    digest: str
    path: str
    aliases: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Such as "ultraflux-transformer version 3 (champion)"."""
        version = f" version {self.version}" if self.version else ", version unknown"
        return self.model + version + (f" ({', '.join(self.aliases)})" if self.aliases else "")


def registered_weights(client: MlflowClient) -> list[RegisteredWeights]:
    """Every registered version that carries a digest."""
    found = []
    for model in client.search_registered_models():
        aliases = dict(model.aliases or {})
        for version in client.search_model_versions(f"name='{model.name}'"):
            tags = version.tags or {}
            if DIGEST_TAG in tags:
                names = tuple(
                    sorted(a for a, v in aliases.items() if str(v) == str(version.version))
                )
                found.append(
                    RegisteredWeights(
                        model=model.name,
                        version=str(version.version),
                        digest=tags[DIGEST_TAG],
                        path=tags.get(PATH_TAG, ""),
                        aliases=names,
                    )
                )
    return found
