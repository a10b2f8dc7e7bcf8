"""The corpus as a Croissant file: machine-readable, and its rows readable through it.

Source: Croissant format specification 1.0 (MLCommons, docs.mlcommons.org/croissant). Written as
JSON-LD here, since the reference implementation brings an RDF store; tests read the file with it.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from components.corpus.manifest import SCHEMA
from components.papers.facts import Facts

TABLES = "data"
"""Folder of the tables beside the file."""
_TYPES = {"string": "sc:Text", "double": "sc:Float", "int32": "sc:Integer", "bool": "sc:Boolean"}
_TERMS = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject"),
    *("fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField"),
    *("path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate"),
    *("separator", "source", "subField", "transform"),
)
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
} | {term: f"cr:{term}" for term in _TERMS}


def croissant(facts: Facts) -> dict[str, Any]:
    """JSON-LD of the corpus: a file and a record set for each slice.

    Columns are those of the manifest's schema; `image_id` is the key, the sha256 of the original
    photograph.
    """
    rows = sum(one.rows for one in facts.slices)
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": facts.corpus_name,
        "description": describe(facts),
        "license": [address or name for name, address, _ in facts.licenses],
        "creator": {"@type": "sc:Organization", "name": f"{facts.name} ({facts.software})"},
        "datePublished": facts.origin.published,
        "version": facts.version,
        "url": f"urn:ultraflux:{facts.corpus_name}:{facts.version.partition('+')[2]}",
        "citeAs": facts.citation,
        "keywords": ["text-to-image", "photographs", "captions", "multi-aspect"],
        "isLiveDataset": False,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": f"{one.name}.parquet",
                "name": f"{one.name}.parquet",
                "description": one.description,
                "contentUrl": f"{TABLES}/{one.name}.parquet",
                "encodingFormat": "application/x-parquet",
                "sha256": one.sha256,
            }
            for one in facts.slices
        ],
        "recordSet": [_records(one.name, one.description) for one in facts.slices],
        "rai:dataCollection": (
            f"{facts.selection['candidates']} candidates, {facts.selection['kept']} kept by the "
            f"rules of selection; {rows} rows in {len(facts.slices)} slices"
        ),
        "rai:dataPreprocessingProtocol": [
            "resized and cropped to training sizes",
            f"captions by {', '.join(name for name, _ in facts.captions)}",
        ],
    }


def describe(facts: Facts) -> str:
    """Two sentences about the corpus."""
    parts = ", ".join(f"{one.name} {one.rows}" for one in facts.slices)
    return (
        f"{len(facts.credits)} photographs ({facts.gigapixels:.2f} gigapixels) by "
        f"{facts.photographers} photographers, with captions, measurements, licences and authors, "
        f"as {facts.software} selected them for training text-to-image models. Rows by slice: "
        f"{parts}."
    )


def _records(name: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "key": {"@id": f"{name}/image_id"},
        "field": [_field(name, field) for field in SCHEMA],
    }


def _field(slice_name: str, field: pa.Field) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{slice_name}/{field.name}",
        "name": f"{slice_name}/{field.name}",
        "description": f"Column {field.name} of the manifest.",
        "dataType": _TYPES[str(field.type)],
        "source": {
            "fileObject": {"@id": f"{slice_name}.parquet"},
            "extract": {"column": field.name},
        },
    }
