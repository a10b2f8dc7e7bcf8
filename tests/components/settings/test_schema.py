"""Settings: strict, bounded, one clear line per problem."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from components.settings.schema import Settings, SettingsError, load_settings, parse_settings
from components.settings.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[3]
VALUES = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def changed(path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    *sections, key = path.split(".")
    target = values
    for section in sections:
        # A section with defaults need not be written down.
        target = target.setdefault(section, {})
    target[key] = value
    return values


def test_the_committed_parameters_are_valid() -> None:
    assert load_settings(ROOT / "params.yaml").project.profile == "embedded"


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(changed("select.min_entropy_bit", 6.8))
    assert "select.min_entropy_bit" in str(caught.value)
    assert "did you mean 'min_entropy_bits'" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("select.max_flat_fraction", 1.5, "less than or equal to 1"),
        ("signals.patch_px", 0, "greater than or equal to 8"),
        ("dit_stage1.learning_rate", 0.0, "greater than 0"),
        ("dit_stage1.learning_rate", float("inf"), "finite number"),
        ("dit_stage1.timestep_shift", float("inf"), "must be a number greater than 0, or dynamic"),
        ("generate.guidance_scale", float("nan"), "finite number"),
        ("objective.snr_huber.c_min", float("inf"), "finite number"),
        ("dit_stage1.sigma_range", [0.9, 0.1], "must be increasing"),
        ("dit_stage1.timestep_shift", 0.0, "must be a number greater than 0, or dynamic"),
        ("dit_stage1.timestep_shift", "flux", "must be a number greater than 0, or dynamic"),
        ("dit_stage1.caption_dropout", 1.5, "less than or equal to 1"),
        ("dit_stage1.global_batch_size", 7, "multiple of"),
        ("dit_stage1.offload_base", True, "needs an adapter (here none)"),
        ("generate.sizes", [[100, 100]], "multiples of 32"),
        ("generate.sizes", ["256x128"], "0 = '256x128': must be a list, in brackets or with a"),
        ("generate.sizes", ["256x128"], "dash before each item, here [HEIGHT, WIDTH]"),
        ("ingest.extensions", ".jpg", "must be a list"),
        ("models.autoencoder", None, "models.autoencoder is empty: write its keys below it; `ult"),
        ("models.autoencoder", [1], "must be a section: keys with values, indented below it"),
        ("generate.step_cache_threshold", 0, "greater than 0"),
        ("generate.step_cache_interval", 1, "greater than or equal to 2"),
        ("generate.attention_backend", "xformers", "'native', 'flash', 'flash_3', 'cudnn' or"),
        ("models.autoencoder.stride", 3, "1 or 2"),
        ("select.min_pixels", "many", "integer"),
        ("ingest.recursive", 1, "boolean"),
    ],
)
def test_a_bad_value_names_field_value_and_range(path: str, value: Any, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(changed(path, value))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert path.rsplit(".", 1)[0] in message
    assert expected in message


def test_a_rule_between_fields_does_not_print_their_whole_section() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(changed("runtime.context_parallel_degree", 7))
    message = str(caught.value)
    assert "runtime.context_parallel_degree 7 does not divide" in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"gradient_checkpointing": "none"}, "gradient_checkpointing 'blocks' (here 'none')"),
        ({"zero_stage": 3}, "zero_stage 0 to 2 (here 3)"),
        ({"adapter": None}, "an adapter (here none)"),
    ],
)
def test_a_base_waits_on_the_host_only_where_it_is_frozen_and_recomputed(
    changes: dict[str, Any], expected: str | None
) -> None:
    values = changed("dit_stage1.offload_base", True)
    adapter = {"rank": 1, "alpha": 1, "target_modules": ["to_q"]}
    values["dit_stage1"] |= {"adapter": adapter, "gradient_checkpointing": "blocks"} | changes
    if expected is None:
        assert parse_settings(values).dit_stage1.offload_base
        return
    with pytest.raises(SettingsError) as caught:
        parse_settings(values)
    assert expected in str(caught.value)


def test_a_density_that_is_shifted_by_itself_is_not_shifted_again() -> None:
    values = changed("dit_stage1.timestep_density", "shifted")
    parse_settings(values)
    values["dit_stage1"]["timestep_shift"] = 3.0
    with pytest.raises(SettingsError, match="would shift the density 'shifted' twice"):
        parse_settings(values)


def test_every_problem_gets_its_own_line() -> None:
    values = changed("select.max_flat_fraction", 2.0)
    values["signals"]["patch_px"] = -1
    with pytest.raises(SettingsError) as caught:
        parse_settings(values)
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="config compose"):
        load_settings(tmp_path / "params.yaml")


def test_broken_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "params.yaml")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("steps: 0200", "0200 is read in two ways"),
        ("steps: 08", "08 is read in two ways"),
        ("steps: 1:30", "1:30 is read in two ways"),
        ("resume: yes", "write true or false"),
        ("steps: 1\n  steps: 2", "the key 'steps' is there twice"),
    ],
)
def test_what_dvc_reads_otherwise_is_refused_with_its_line(
    tmp_path: Path, line: str, expected: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"dit_stage1:\n  {line}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    said = str(caught.value)
    assert said.startswith(f"{path} line {2 + line.count(chr(10))}: ")
    assert expected in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("path", ["params.yaml", "conf/base.yaml", "conf/profiles/paper.yaml"])
def test_files_of_settings_are_read_as_dvc_reads_them(path: str) -> None:
    assert read_yaml(ROOT / path) == YAML(typ="safe").load(ROOT / path)


def test_numbers_that_both_versions_know_and_quoted_texts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    # Powers without a point are DVC's own: `dvc exp run -S` writes 1e-05.
    path.write_text("[1.0e-4, 1e-05, -2E3, 1.5e3, 1_000, 0x1f, .5, -0, true, '0200', '1e5', ~]")
    found = read_yaml(path)
    assert found == [1e-4, 1e-5, -2e3, 1.5e3, 1000, 31, 0.5, 0, True, "0200", "1e5", None]
    assert found == YAML(typ="safe").load(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "params.yaml: empty; `ultraflux config compose"),
        ("# nothing\n", "params.yaml: empty; `ultraflux config compose"),
        ("a: " + "[" * 600 + "]" * 600, "not valid YAML: brackets in brackets without end"),
        ("a: 9223372036854775808", "line 1: 9223372036854775808 does not fit into 64 bits"),
    ],
    ids=["empty", "comment", "brackets", "integer"],
)
def test_what_holds_no_settings_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_or_other_bytes_in_place_of_settings_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"{tmp_path}: a folder"):
        load_settings(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_bytes(b"project:\n  name: caf\xe9\n")
    with pytest.raises(SettingsError, match=r"params\.yaml: not UTF-8 at byte 20 \(line 2\)"):
        load_settings(path)


def test_settings_are_frozen() -> None:
    settings = parse_settings(VALUES)
    with pytest.raises(ValueError, match="frozen"):
        settings.project.seed = 3  # type: ignore[misc]


def _leaves(model: Any, prefix: str = "") -> list[str]:
    found = []
    for name, value in model.model_dump().items():
        child = getattr(model, name)
        if hasattr(child, "model_dump"):
            found += _leaves(child, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
            assert not isinstance(value, dict)
    return found


@given(st.sampled_from(_leaves(parse_settings(VALUES))))
def test_no_field_accepts_a_mapping(path: str) -> None:
    with pytest.raises(SettingsError, match=path.split(".")[0]):
        parse_settings(changed(path, {"x": 1}))


def test_the_schema_names_every_section_of_the_parameters() -> None:
    assert set(Settings.model_fields) == set(VALUES)
