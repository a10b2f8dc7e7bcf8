"""Templates for clusters against what their public documentation says of the fields.

The schemas below are the project's own reading of the documents that they name, as far as the
templates go: a field that is not in them is refused, so that a misspelt one is found here and not
on a cluster. Nothing has been run on one.
"""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from components.settings.schema import load_settings
from flows.versioning import graph as versioning

MEMORY = {"enum": ["", "Memory"]}
TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 1}
QUANTITY = {"type": ["string", "integer"], "pattern": r"^[0-9.]+(m|[KMGT]i?)?$"}
LABEL = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 63}


def exactly(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


# Kubernetes API reference, core/v1: Container, EnvVar, PodSpec, Volume.
ENV = {
    "oneOf": [
        exactly({"name": TEXT, "value": {"type": "string"}}),
        exactly({"name": TEXT, "valueFrom": exactly({"fieldRef": exactly({"fieldPath": TEXT})})}),
    ]
}
CONTAINER = exactly(
    {"name": LABEL, "image": TEXT},
    {
        "command": several(TEXT),
        "args": several(TEXT),
        "workingDir": {"type": "string", "pattern": "^/"},
        "env": several(ENV),
        "resources": exactly(
            {},
            {
                "limits": {"type": "object", "additionalProperties": QUANTITY},
                "requests": {"type": "object", "additionalProperties": QUANTITY},
            },
        ),
        "volumeMounts": several(exactly({"name": LABEL, "mountPath": TEXT})),
    },
)
VOLUME = {
    "oneOf": [
        exactly({"name": LABEL, "persistentVolumeClaim": exactly({"claimName": LABEL})}),
        exactly(
            {
                "name": LABEL,
                "emptyDir": exactly(
                    {}, {"medium": {"enum": ["", "Memory"]}, "sizeLimit": QUANTITY}
                ),
            }
        ),
    ]
}
POD = exactly(
    {"containers": several(CONTAINER), "restartPolicy": {"enum": ["Never", "OnFailure"]}},
    {"terminationGracePeriodSeconds": COUNT, "volumes": several(VOLUME)},
)
# batch/v1 JobSpec; only Never and OnFailure may a Job's pods have.
JOB = exactly(
    {"template": exactly({"spec": POD})},
    {
        "completionMode": {"enum": ["NonIndexed", "Indexed"]},
        "completions": COUNT,
        "parallelism": COUNT,
        "backoffLimit": {"type": "integer", "minimum": 0},
    },
)
REPLICATED = exactly({"name": LABEL, "template": exactly({"spec": JOB})}, {"replicas": COUNT})
# jobset.sigs.k8s.io, API reference of jobset.x-k8s.io/v1alpha2.
JOBSET = exactly(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": exactly(
            {"namespace": LABEL},
            {
                "name": LABEL,
                # A name is made of it and five letters, and pods' names of that.
                "generateName": {"type": "string", "pattern": "^[a-z][-a-z0-9]{0,40}$"},
                "labels": {"type": "object", "additionalProperties": LABEL},
            },
        ),
        "spec": exactly(
            {
                "replicatedJobs": several(
                    exactly(
                        {"name": LABEL, "template": exactly({"spec": JOB})}, {"replicas": COUNT}
                    )
                )
            },
            {
                "network": exactly(
                    {},
                    {
                        "enableDNSHostnames": {"type": "boolean"},
                        "subdomain": LABEL,
                        "publishNotReadyAddresses": {"type": "boolean"},
                    },
                ),
                "coordinator": exactly(
                    {"replicatedJob": LABEL},
                    {
                        "jobIndex": {"type": "integer", "minimum": 0},
                        "podIndex": {"type": "integer", "minimum": 0},
                    },
                ),
                "failurePolicy": exactly(
                    {},
                    {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                    },
                ),
                "suspend": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
            },
        ),
    }
)
# docs.skypilot.co, "SkyPilot YAML".
SKYPILOT = exactly(
    {"name": TEXT, "run": TEXT, "resources": exactly(
        {},
        {
            "accelerators": {"type": "string", "pattern": r"^[A-Z0-9-]+(:[0-9]+)?$"},
            "cpus": {"type": ["string", "integer"], "pattern": r"^[0-9]+\+?$"},
            "memory": {"type": ["string", "integer"], "pattern": r"^[0-9]+\+?$"},
            "disk_size": COUNT,
            "use_spot": {"type": "boolean"},
            "job_recovery": exactly(
                {},
                {
                    "strategy": TEXT,
                    "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                },
            ),
        },
    )},
    {
        "workdir": TEXT,
        "num_nodes": COUNT,
        "setup": TEXT,
        "envs": {"type": "object", "additionalProperties": {"type": ["string", "number"]}},
    },
)  # fmt: skip
TEMPLATES = {
    "conf/kubernetes/dit_stage.jobset.yaml": JOBSET,
    "conf/skypilot/stage.yaml": SKYPILOT,
}


def loaded(root: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((root / name).read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_has_documented_fields_alone(root: Path, name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(TEMPLATES[name])
    jsonschema.validate(loaded(root, name), TEMPLATES[name])
    assert "hecked against the schema; not run" in (root / name).read_text(encoding="utf-8")


def _misspelt(values: dict[str, Any]) -> None:
    values["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 2


def _always(values: dict[str, Any]) -> None:
    job = values["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["template"]["spec"]["restartPolicy"] = "Always"


def _old(values: dict[str, Any]) -> None:
    values["apiVersion"] = "jobset.x-k8s.io/v1alpha1"


@pytest.mark.parametrize("change", [_misspelt, _always, _old])
def test_the_schema_refuses_what_a_cluster_would(
    root: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    values = copy.deepcopy(loaded(root, "conf/kubernetes/dit_stage.jobset.yaml"))
    change(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, JOBSET)


def test_the_set_is_one_gang_whose_parts_fit_each_other(root: Path) -> None:
    values = loaded(root, "conf/kubernetes/dit_stage.jobset.yaml")
    assert values["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    (node,) = values["spec"]["replicatedJobs"]
    job = node["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert job["backoffLimit"] == 0
    assert values["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert values["spec"]["coordinator"]["replicatedJob"] == node["name"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    named = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == named
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["NODES"]["value"] == str(job["completions"])
    script, stage = container["command"][1:]
    assert (root / script).is_file()
    assert versioning.stage_graph(root)[stage].meta.trains
    # Longer than the ranks take to finish their step and save.
    runtime = load_settings(root / "params.yaml").runtime
    assert pod["terminationGracePeriodSeconds"] > runtime.grace_s


def test_scripts_of_the_templates_are_valid_and_their_commands_exist(root: Path) -> None:
    sky = loaded(root, "conf/skypilot/stage.yaml")
    for text in (
        (root / "conf/kubernetes/dit_node.sh").read_text(encoding="utf-8"),
        sky["setup"],
        sky["run"],
    ):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert sky["envs"]["STAGE"] in versioning.stage_graph(root)
    for command in (["dvc", "repro", "--pull", "--help"], ["make", "-n", "setup"]):
        subprocess.run(command, cwd=root, check=True, capture_output=True)


def test_a_first_node_with_another_number_of_nodes_says_so(root: Path, tmp_path: Path) -> None:
    """The script itself, as far as it goes without a cluster."""
    (tmp_path / "params.yaml").write_text("runtime: {nodes: 1, rendezvous_endpoint: null}\n")
    script = root / "conf/kubernetes/dit_node.sh"

    env = os.environ | {"JOB_COMPLETION_INDEX": "0", "NODES": "2", "COORDINATOR": "first.set"}
    done = subprocess.run(
        ["bash", str(script), "dit_stage1"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "runtime.nodes = 1, set has 2" in done.stderr
    assert list((tmp_path / "runs").iterdir()) == []
