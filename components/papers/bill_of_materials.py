"""A bill of materials (CycloneDX 1.6) of a model: weights, their origin, data, packages."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from components.papers.facts import Facts

_NAMESPACE = uuid.UUID("6f2d2f0c-7b0e-5a5e-9a57-0f1d3a3f6c11")
"""Ours, drawn once: serial numbers are made in it from the weights, so equal models have one."""


def bill_of_materials(facts: Facts) -> str:
    """CycloneDX JSON; equal facts give equal text."""
    bom = Bom()
    digests = [one.sha256 for one in facts.weights] + [one.sha256 for one in facts.slices]
    key = "".join(digests)
    bom.serial_number = uuid.uuid5(_NAMESPACE, key)
    bom.metadata.timestamp = datetime.fromisoformat(facts.origin.published).replace(tzinfo=UTC)
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=facts.model_name,
        version=facts.weights[-1].sha256[:16],
        bom_ref=facts.model_name,
        description=f"Trained by {facts.software} on {facts.corpus_name} {facts.version}",
        properties=[
            Property(name=f"ultraflux:metric:{name}", value=repr(value))
            for name, value in sorted(facts.metrics.items())
        ]
        + [Property(name="ultraflux:commit", value=facts.origin.commit or "unknown")],
    )
    bom.metadata.component = model
    weights = [_weights(facts, index) for index in range(len(facts.weights))]
    parts = [*weights, *_bases(facts)]
    data, packages = _data(facts), _packages(facts)
    for component in (*parts, *data, *packages):
        bom.components.add(component)
    bom.register_dependency(model, [*weights, *packages])
    for component in weights:
        bom.register_dependency(component, [*_bases(facts), *data])
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _weights(facts: Facts, index: int) -> Component:
    one = facts.weights[index]
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=one.name,
        version=one.sha256[:16],
        bom_ref=f"weights:{one.name}",
        hashes=[_sha256(one.sha256)],
        properties=[
            Property(name="ultraflux:stage", value=one.stage),
            Property(name="ultraflux:run", value=facts.origin.runs.get(one.stage, "unknown")),
            Property(name="ultraflux:path", value=one.path.as_posix()),
        ],
    )


def _bases(facts: Facts) -> list[Component]:
    """Published weights that training began from, by their folder in the settings."""
    models = facts.settings.models
    given = {
        "transformer": models.transformer.pretrained,
        "autoencoder": models.autoencoder.pretrained,
        "text encoders": models.text_encoders.pretrained,
    }
    card = models.transformer.card
    return [
        Component(
            type=ComponentType.MACHINE_LEARNING_MODEL,
            name=f"{card.base_model or folder} ({part})",
            bom_ref=f"base:{part}",
            licenses=[DisjunctiveLicense(name=card.license_name or card.license)],
        )
        for part, folder in given.items()
        if folder is not None
    ]


def _data(facts: Facts) -> list[Component]:
    return [
        Component(
            type=ComponentType.DATA,
            name=f"{facts.corpus_name}/{one.name}",
            version=facts.version,
            bom_ref=f"data:{one.name}",
            description=one.description,
            hashes=[_sha256(one.sha256)],
            licenses=[
                DisjunctiveLicense(name=name)
                for name in sorted({row["license_id"] for row in one.credits})
            ],
            properties=[Property(name="ultraflux:photographs", value=str(one.rows))],
        )
        for one in facts.slices
    ]


def _packages(facts: Facts) -> list[Component]:
    return [
        Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=version,
            bom_ref=f"pkg:{name}",
            purl=PackageURL("pypi", None, name, version),
        )
        for name, version in sorted(facts.origin.packages.items())
    ]
