"""Dataset card and model card for a hub: YAML that its pages understand, then text for people.

The model card is the one that training wrote (`training.dit.model_card`), with what came after:
the data's name, evaluation, licences, attribution, a summary of the training content.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from components.papers.croissant import TABLES, describe
from components.papers.facts import Facts

ATTRIBUTION = "ATTRIBUTION.csv"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LISTED = 30


def hub_license(name: str) -> str:
    """A licence by `license_id` as hubs list it; "other" for what they do not."""
    if name == "unknown":
        return "unknown"
    return name.lower() if name.startswith("CC") and name[-1].isdigit() else "other"


def dataset_card(facts: Facts) -> str:
    """README.md of the corpus."""
    licenses = list(dict.fromkeys(hub_license(name) for name, _, _ in facts.licenses))
    size = next((text for limit, text in _SIZES if len(facts.credits) < limit), "n>1M")
    data = DatasetCardData(
        license=licenses,
        size_categories=size,
        task_categories=["text-to-image"],
        pretty_name=facts.corpus_name,
        # Shown by the hub as sub-sets with one split each.
        configs=[
            {
                "config_name": one.name,
                "data_files": [
                    {
                        "split": "test" if one.name == "eval" else "train",
                        "path": f"{TABLES}/{one.name}.parquet",
                    }
                ],
            }
            for one in facts.slices
        ],
    )
    slices = [(one.name, one.rows, one.description) for one in facts.slices]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {facts.corpus_name}\n",
            describe(facts) + f" Version {facts.version}.\n",
            "## Slices\n",
            table(("slice", "photographs", "what it is"), slices),
            *_rights(facts),
            *content_summary(facts),
            "## Files\n",
            f"`croissant.json` describes the tables of `{TABLES}/`; `{ATTRIBUTION}` credits every "
            "photograph. The photographs themselves are named by sha256 (`image_id`) and address, "
            "not part of this.\n",
        ]
    )


def model_card(facts: Facts) -> str:
    """README.md of the model: the card of training, completed."""
    front, body = split_card(facts.card)
    results = [
        EvalResult(
            task_type="text-to-image",
            task_name="Text to image",
            dataset_type=facts.corpus_name,
            dataset_name=facts.corpus_name,
            dataset_config="eval",
            dataset_split="test",
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in sorted(facts.metrics.items())
        # JSON and YAML of hubs know no infinities.
        if math.isfinite(value)
    ]
    more: dict[str, Any] = {"datasets": [facts.corpus_name]}
    if "base_model" in front:
        adapted = facts.settings.dit_stage2.adapter is not None
        more["base_model_relation"] = "adapter" if adapted else "finetune"
    more["model_name"] = facts.model_name
    data = ModelCardData(**{**front, **more})
    index = eval_results_to_model_index(facts.model_name, results)
    written = {**front, **data.to_dict(), "model-index": index}
    text = yaml.safe_dump(written, sort_keys=False, width=100, allow_unicode=True)
    return "\n".join(
        [
            f"---\n{text}---\n",
            body.strip() + "\n",
            "## Evaluation\n",
            _verdict(facts),
            table(("metric", "value"), [(r.metric_name, f"{r.metric_value:.6g}") for r in results]),
            *_rights(facts),
            *content_summary(facts),
            "## Origin\n",
            table(("what", "which"), _origin(facts)),
        ]
    )


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """(front matter, body) of a card.

    Raises:
        ValueError: it has no front matter.
    """
    parts = text.split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        raise ValueError("a model card without front matter")
    return yaml.safe_load(parts[1]), parts[2]


def _verdict(facts: Facts) -> str:
    if facts.decision is None:
        return "The gate has not judged these weights.\n"
    said = "passed" if facts.decision["promoted"] else "refused"
    return f"Measured on the held-out slice `eval` and on pictures of it. The gate {said} them.\n"


def _rights(facts: Facts) -> list[str]:
    shared = (
        f"{facts.share_alike} photographs are under licences that ask for themselves in works made "
        "from them (share-alike); they are marked in the attribution file.\n"
        if facts.share_alike
        else "No photograph is under a share-alike licence.\n"
    )
    rows = [(name, address or "-", number) for name, address, number in facts.licenses]
    return [
        "## Licences and attribution\n",
        table(("licence", "text", "photographs"), rows),
        shared,
        f"`{ATTRIBUTION}` credits {facts.photographers} photographers, photograph by photograph.\n",
    ]


def content_summary(facts: Facts) -> list[str]:
    """The training content in the order in which summaries for the public ask for it."""
    select = facts.settings.select
    rules = select.licenses
    rejected = [
        (name.removeprefix("rejected_"), number)
        for name, number in facts.selection.items()
        if name.startswith("rejected_") and number
    ]
    allowed = "all that are not denied" if rules.allow is None else ", ".join(rules.allow)
    measures = [
        f"licences allowed: {allowed}",
        f"denied: {', '.join(rules.deny) or 'none'}",
        f"share-alike: {rules.share_alike}",
        f"entries on the list of exclusions: {facts.exclusions}",
        f"unsafe content above {select.max_nsfw}: rejected"
        if select.max_nsfw is not None
        else "unsafe content: no rule is on",
    ]
    return [
        "## Summary of the training content\n",
        f"Still images with captions. {facts.selection['candidates']} candidates, "
        f"{facts.selection['kept']} kept.\n",
        table(("origin", "photographs"), facts.hosts[:_LISTED]),
        table(("captions by", "photographs"), facts.captions[:_LISTED]),
        table(("left out by the rule", "photographs"), rejected),
        "\n".join(f"- {line}" for line in measures) + "\n",
    ]


def _origin(facts: Facts) -> list[tuple[str, str]]:
    return [
        ("corpus", f"{facts.corpus_name} {facts.version}"),
        ("commit", facts.origin.commit or "unknown"),
        ("packages", f"requirements.lock {facts.origin.lock_sha256[:16]}"),
        *((f"run of {stage}", name) for stage, name in facts.origin.runs.items()),
        *((one.name, f"sha256 {one.sha256}") for one in facts.weights),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, or a sentence where there is no row."""
    if not rows:
        return f"No {head[0]}.\n"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(one) for one in line) + " |" for line in lines) + "\n"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
