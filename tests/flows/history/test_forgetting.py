"""Whom forgetting affects, what a certificate reads and signs, and that weights are then equal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small_project
import yaml
from mlflow import MlflowClient
from recorded_project import ROWS, RecordedProject, image

from components.corpus.selection.rights import Exclusion, Exclusions, read_exclusions
from components.files.signatures import checked, fingerprint, signed, signing_key
from components.files.weight_folders import folder_digest
from flows.commands.corpus.forget import _certify
from flows.history.affected import Affected, affected_by
from flows.history.forgetting_certificate import (
    FORMAT,
    VERSION,
    NotForgotten,
    differences,
    read_certificate,
    statement,
)
from flows.history.lock_chain import ChainBroken
from flows.history.run_evidence import Evidence
from flows.tracking.registry import Promotion, register, registered_weights, retire
from flows.tracking.uploader import Uploader, tracking_uri

LEE = Exclusion("photographer", "Ann Lee")


def affected(project: RecordedProject) -> Affected:
    return affected_by(Evidence(project.root, mlflow=False), Exclusions([LEE]))


def certificate(project: RecordedProject, before: Affected) -> dict[str, Any]:
    return statement(Evidence(project.root, mlflow=False), [LEE], before)


WITHOUT = [row for row in ROWS if row[0] != "tree"]


@pytest.fixture
def small(toy: Path) -> RecordedProject:
    project = RecordedProject(toy)
    project.train(ROWS, "with")
    return project


def test_all_that_rests_on_a_photograph_is_found(small: RecordedProject) -> None:
    found = affected(small)
    # The rejected photograph is theirs, too; nothing was made from it.
    assert found.images == sorted([image("tree"), image("blur")])
    assert found.slices == {"vae": 1, "stage1": 1, "stage2": 1, "ablation": 1, "eval": 0}
    assert [run.split()[0] for run in found.runs] == [
        "vae",
        "latents",
        "text_embeddings",
        "dit_stage1",
        "dit_stage2",
    ]
    assert sorted(found.weights.values()) == [
        "dit_stage1/ema",
        "dit_stage1/raw",
        "dit_stage2/ema",
        "dit_stage2/raw",
        "vae/autoencoder",
    ]
    assert found.unknown == []


def test_weights_that_never_saw_it_are_not_affected(toy: Path) -> None:
    project = RecordedProject(toy)
    project.train([("blur", "Ann Lee", None), *ROWS[1:3]], "without")
    found = affected(project)
    assert found.images == [image("blur")]
    assert found.weights == {}
    assert found.runs == []


def test_a_later_stage_is_affected_through_what_it_read(small: RecordedProject) -> None:
    """Stage 2 on other photographs begins from weights that saw this one."""
    stage2 = pd.DataFrame({"image_id": [image("sea")], "uri": ["photos/sea.jpg"], "kept": [True]})
    small.write("slices/stage2", stage2)
    small.weights("dit_stage2", ["raw", "ema"], "other")
    made = ["data/dit_stage2/raw", "data/dit_stage2/ema"]
    before = ["data/dit_stage1/raw", "data/dit_stage1/ema"]
    small.run("dit_stage2", ["data/slices/stage2.parquet", *before], made)
    digest = folder_digest(small.root / made[0])
    assert affected(small).weights[digest] == "dit_stage2/raw"


def test_a_near_duplicate_of_another_photographer_is_named(small: RecordedProject) -> None:
    table = pd.DataFrame(
        {
            "image_id": [image("tree"), image("crop")],
            "uri": ["photos/tree.jpg", "photos/crop.jpg"],
            "kept": [True, False],
            "duplicate_of": [None, image("tree")],
        }
    )
    small.write("select/manifest", table)
    assert affected(small).look_alikes == ["photos/crop.jpg"]


def test_a_table_that_is_gone_is_said_and_not_taken_for_clean(small: RecordedProject) -> None:
    small.train(WITHOUT, "without")
    # Its tables of training rows are equal, and so are one table.
    assert any("data/slices/vae.parquet" in name for name in affected(small).unknown)


def test_a_certificate_names_the_new_weights_and_every_table_that_was_searched(
    small: RecordedProject, typed: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    before = affected(small)
    small.train(WITHOUT, "without")
    said = certificate(small, before)
    assert said["before"]["weights"] == before.weights
    assert {one["path"]: one["sha256"] for one in said["weights"]} == {
        path: folder_digest(small.root / path)
        for path in (
            "data/vae/autoencoder",
            "data/dit_stage1/raw",
            "data/dit_stage1/ema",
            "data/dit_stage2/raw",
            "data/dit_stage2/ema",
        )
    }
    searched = {one["path"] for one in said["searched"]}
    assert {"data/slices/stage1.parquet", "data/latents/index.parquet"} <= searched
    assert {one["found"] for one in said["searched"]} == {0}
    assert said["equal_to_a_run_without_them"].startswith("yes")
    path = tmp_path / "certificate.json"
    key = signing_key(tmp_path)
    path.write_text(signed(said, key), encoding="utf-8")
    assert checked(path.read_text(encoding="utf-8")) == (said, key.public)
    done = typed(small.root, "verify", str(path))
    assert done.returncode == 0, done.stdout
    assert "photographer Ann Lee (2)" in done.stdout
    assert "the weights and slices of this clone are the certificate's" in done.stdout
    # A weight that differs is seen, and so is a byte of the file.
    (small.root / "data/vae/autoencoder/w.safetensors").write_text("other")
    assert "other weights" in typed(small.root, "verify", str(path)).stdout
    path.write_text(path.read_text(encoding="utf-8").replace("Ann Lee", "Ann Lea"), "utf-8")
    done = typed(small.root, "verify", str(path), "--json")
    assert done.returncode == 1
    assert "changed" in json.loads(done.stdout)["problems"][0]


def test_a_certificate_is_written_through_a_link_that_is_named(
    small: RecordedProject, tmp_path: Path
) -> None:
    before = affected(small)
    small.train(WITHOUT, "without")
    link = tmp_path / "named.json"
    link.symlink_to(tmp_path / "real.json")
    _certify(small.root, [LEE], before, signing_key(tmp_path), link)
    assert checked((tmp_path / "real.json").read_text(encoding="utf-8"))


def test_verify_takes_no_other_key_than_the_one_that_was_named(
    small: RecordedProject, typed: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    before = affected(small)
    small.train(WITHOUT, "without")
    ours, theirs = signing_key(tmp_path / "ours"), signing_key(tmp_path / "theirs")
    assert ours.public != theirs.public
    path = tmp_path / "certificate.json"
    path.write_text(signed(certificate(small, before), ours), encoding="utf-8")
    good, bad = (str(tmp_path / who / "development.pem") for who in ("ours", "theirs"))
    assert typed(small.root, "verify", str(path), "--key", good).returncode == 0
    done = typed(small.root, "verify", str(path), "--key", bad)
    assert done.returncode == 1
    assert "signed by key" in done.stdout


def test_verify_names_the_key_that_signed_and_what_it_did_not_compare(
    small: RecordedProject, typed: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    before = affected(small)
    small.train(WITHOUT, "without")
    said, key = certificate(small, before), signing_key(tmp_path)
    path = tmp_path / "certificate.json"

    def verified(**changes: Any) -> subprocess.CompletedProcess[str]:
        path.write_text(signed(said | changes, key), encoding="utf-8")
        return typed(small.root, "verify", str(path))

    assert f"signed by: {key.title}\n" in verified(signed_with=key.title).stdout
    done = verified(signed_with="key 0123456789abcdef")
    assert done.returncode == 1
    assert f"signed by: key {fingerprint(key.public)}\n" in done.stdout
    assert "it says that key 0123456789abcdef signed it" in done.stdout
    # A value of several lines is not lines of the command.
    assert "\n  valid" not in verified(issued="now\n  valid: all", signed_with="x").stdout
    some = [one for one in said["weights"] if one["path"] == "data/vae/autoencoder"]
    assert (
        "data/dit_stage2/ema: the certificate says nothing of it" in verified(weights=some).stdout
    )
    shutil.rmtree(small.root / "data")
    done = verified()
    assert "data/slices/stage1.parquet: not here, so it was not searched" in done.stdout
    assert "of this clone are the certificate's" not in done.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"forgotten": None},
        {"forgotten": {"entries": [{"kind": "colour", "value": "red"}], "images": ["a"]}},
        {"forgotten": {"entries": [], "images": []}},
        {"weights": [{"path": "/", "sha256": "0" * 64}]},
        {"weights": []},
        {"version": 2},
    ],
)
def test_a_signed_statement_of_another_kind_is_no_certificate(
    small: RecordedProject,
    typed: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    good = {
        "format": FORMAT,
        "version": VERSION,
        "issued": "2026-11-29",
        "forgotten": {"entries": [{"kind": "photographer", "value": "A"}], "images": ["a"]},
        "weights": [{"path": "data/vae/autoencoder", "sha256": "0" * 64}],
        "equal_to_a_run_without_them": "yes",
    }
    path = tmp_path / "certificate.json"
    path.write_text(signed(good, signing_key(tmp_path)), encoding="utf-8")
    assert typed(small.root, "verify", str(path)).returncode == 0
    path.write_text(signed(good | changes, signing_key(tmp_path)), encoding="utf-8")
    done = typed(small.root, "verify", str(path))
    assert done.returncode == 1
    assert "CHANGED: no ultraflux-forgetting-certificate" in done.stdout


def test_there_is_no_certificate_while_a_photograph_is_still_there(small: RecordedProject) -> None:
    before = affected(small)
    with pytest.raises(NotForgotten, match="still holds 1 of the photographs"):
        certificate(small, before)
    small.train(WITHOUT, "with")
    with pytest.raises(NotForgotten, match="holds the weights of before"):
        certificate(small, before)


def test_there_is_no_certificate_for_training_that_went_on_from_another_state(
    small: RecordedProject,
) -> None:
    before = affected(small)
    small.train(WITHOUT, "without", **{"segments.1": "abc steps 0 to 2"})
    with pytest.raises(NotForgotten, match="went on from a training state"):
        certificate(small, before)


def test_there_is_no_certificate_where_files_are_not_what_was_made(small: RecordedProject) -> None:
    before = affected(small)
    small.train(WITHOUT, "without")
    store = small.root / "data" / "latents" / "index.parquet"
    kept = store.read_bytes()
    pd.DataFrame({"image_id": [image("tree")]}).to_parquet(store)
    with pytest.raises(NotForgotten, match=r"data/latents/index\.parquet still holds 1"):
        certificate(small, before)
    store.write_bytes(kept)
    (small.root / "data/dit_stage2/ema/w.safetensors").write_text("another")
    with pytest.raises(ChainBroken, match=r"not what dvc\.lock says"):
        certificate(small, before)
    small.weights("dit_stage2", ["ema"], "without")
    small.lock["dit_stage2"]["deps"][0]["md5"] = "0" * 32
    (small.root / "dvc.lock").write_text(yaml.safe_dump({"stages": small.lock}))
    with pytest.raises(ChainBroken, match="read another"):
        certificate(small, before)


def test_a_photograph_that_came_back_is_seen_by_its_photographer(small: RecordedProject) -> None:
    before = affected(small)
    small.train(WITHOUT, "without")
    said = certificate(small, before)
    small.train([*WITHOUT, ("new", "ANN LEE", "train")], "without")
    found = differences(small.root, read_certificate(said, Path("certificate.json")))
    assert any("stage1.parquet: 1 rows" in line for line in found)


def test_versions_of_affected_weights_lose_their_aliases(
    toy: Path, give_store: Callable[[Path], None]
) -> None:
    give_store(toy)
    uploader = Uploader(toy)
    client, experiment = uploader.client, uploader.experiment_id
    for digest, alias in (("a" * 64, "champion"), ("b" * 64, None)):
        register(client, experiment, None, Promotion("toy-dit", "data/x", digest, alias))
    old = next(known for known in registered_weights(client) if known.digest == "a" * 64)
    assert old.aliases == ("champion",)
    retire(client, old, "its data was withdrawn")
    known = {one.digest: one for one in registered_weights(client)}
    assert known["a" * 64] == replace(old, aliases=())
    version = client.get_model_version("toy-dit", old.version)
    assert version.tags["ultraflux.retired"] == "its data was withdrawn"
    other = client.get_model_version("toy-dit", known["b" * 64].version)
    assert "ultraflux.retired" not in other.tags


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name somebody"),
        (["--photographer", " "], "--photographer: photographer has no value"),
        (["--photographer", "Ann Leigh"], "no photograph .* did you mean 'Ann Lee'"),
        (["--identity", "blurr.jpg"], "no photograph .*; did you mean .*/blur.jpg"),
        (["--list", "none.csv"], "--list none.csv: cannot be read"),
    ],
)
def test_nobody_is_refused_in_one_line(
    small: RecordedProject,
    typed: Callable[..., subprocess.CompletedProcess[str]],
    options: list[str],
    said: str,
) -> None:
    import re

    done = typed(small.root, "corpus", "forget", *options)
    assert done.returncode != 0
    assert re.search(said, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_of_a_list_of_nobody_three_and_their_number_are_said(
    small: RecordedProject, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    listed = small.root / "README.md"
    listed.write_text("".join(f"{n} {'x' * 300}\n" for n in range(40)))
    done = typed(small.root, "corpus", "forget", "--list", str(listed))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) < 200
    assert lines[3] == "error: and 37 more without a photograph"


def test_a_list_names_people_addresses_and_digests_by_the_line(
    small: RecordedProject, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    listed = small.root / "names.txt"
    listed.write_text(f"Ann Lee\n\n{image('sea')}\n")
    done = typed(small.root, "corpus", "forget", "--list", str(listed), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == sorted(map(image, ("tree", "blur", "sea")))
    # Asked only: the list of exclusions is as it was.
    assert read_exclusions(small.root / "conf" / "exclusions.csv") == []


def test_each_name_without_a_photograph_is_said_beside_one_that_has(
    small: RecordedProject, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    names = ["--photographer", "Ann Lee", "--photographer", "Bo Eck", "--host", "nowhere.example"]
    done = typed(small.root, "corpus", "forget", *names, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["photographs_by_entry"] == [2, 0, 0]
    lines = done.stderr.splitlines()
    assert lines[0].endswith("did you mean 'Bo Ek'?")
    assert lines[1].startswith("warning: host 'nowhere.example': no photograph")
    done = typed(small.root, "corpus", "forget", *names, "--rebuild")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: nothing was changed: leave them out"
    assert read_exclusions(small.root / "conf" / "exclusions.csv") == []


def test_a_list_is_a_table_by_its_header_in_any_letters_and_a_pipe_is_none(
    small: RecordedProject, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    listed = small.root / "names.csv"
    listed.write_text("Kind, Value\nphotographer,Bo Ek\n")
    done = typed(small.root, "corpus", "forget", "--list", str(listed), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["photographs_by_entry"] == [2]
    os.mkfifo(small.root / "pipe")
    done = typed(small.root, "corpus", "forget", "--list", "pipe")
    assert done.returncode == 2
    assert "not a regular file" in done.stderr


@pytest.mark.slow
def test_weights_without_a_photographer_equal_those_of_a_run_whose_source_never_held_them(
    small_clone: Callable[..., Path], clone: Callable[..., Path]
) -> None:
    """The promise itself, through the commands that a user types: three runs of the pipeline."""

    def typed(project: Path, *arguments: str) -> str:
        done = subprocess.run(
            ["ultraflux", *arguments], cwd=project, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    project = small_clone("forgetting")
    typed(project, "run")
    asked = json.loads(typed(project, "corpus", "forget", "--photographer", "Sean Afnan", "--json"))
    assert asked["slices"]["stage1"] == 1
    # Not among the least flat half, so the decoder never saw it.
    stages = [f"dit_stage{n}/{part}" for n in (1, 2) for part in ("ema", "raw")]
    assert sorted(asked["weights"].values()) == stages
    assert asked["pictures"]
    path = project / "certificate.json"
    options = ["--photographer", "sean afnan", "--rebuild", "--certificate", str(path)]
    certified = json.loads(typed(project, "corpus", "forget", *options, "--json"))
    assert certified["certificate"] == str(path)
    assert "valid" in typed(project, "verify", str(path))
    said, _ = checked(path.read_text(encoding="utf-8"))
    photos = [name for name in small_project.PHOTOS if not name.startswith("sean-afnan")]
    other = clone("never-held", small_project.SETTINGS, photos)
    typed(other, "run")
    for one in said["weights"]:
        assert one["sha256"] not in asked["weights"], one["path"]
        assert one["sha256"] == folder_digest(other / one["path"]), one["path"]
    pictures = [(p / "data/generate/generations.jsonl").read_text() for p in (project, other)]
    assert pictures[0] == pictures[1]
    client = MlflowClient(tracking_uri(project))
    retired = [k for k in registered_weights(client) if k.digest in asked["weights"]]
    assert retired
    assert not any(known.aliases for known in retired)
