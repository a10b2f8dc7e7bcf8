"""What scripts and shells ask of the command line: places, JSON, silence, completion."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from flows.commands.command_line import fail

Typed = Callable[..., subprocess.CompletedProcess[str]]


def completed(words: str, cwd: Path) -> list[str]:
    """What the shell would offer behind these words."""
    asked = {
        "_ULTRAFLUX_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    program = Path(sys.executable).parent / "ultraflux"
    done = subprocess.run(
        [str(program)],
        cwd=cwd,
        env=os.environ | asked | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def test_an_error_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    fail("a\x1b[2J\nb")
    assert capsys.readouterr().err == "error: a\\x1b[2J\nerror: b\n"


def test_shells_complete_commands_stages_and_profiles(root: Path, tmp_path: Path) -> None:
    assert completed("ultraflux ev", root) == ["evaluate"]
    assert completed("ultraflux stage run dit", root) == ["dit_stage1", "dit_stage2"]
    assert completed("ultraflux config compose --profile si", root) == ["single-gpu"]
    # Outside of a clone there is none to name.
    assert completed("ultraflux stage run dit", tmp_path) == []


def test_pictures_are_measured_and_compared_outside_of_a_clone(
    tmp_path: Path, typed: Typed
) -> None:
    for folder in ("bench", "mine"):
        (tmp_path / folder).mkdir()
        Image.radial_gradient("L").convert("RGB").save(tmp_path / folder / "a.png")
    (tmp_path / "bench" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    measured = typed(tmp_path, "measure", "mine", "--json")
    assert (measured.returncode, json.loads(measured.stdout)["width"]) == (0, 256)
    words = ("evaluate", "bench", "--system", "mine=mine", "--metrics", "colourfulness")
    done = typed(tmp_path, *words, "--quiet")
    scores = tmp_path / "runs" / "evaluations" / "bench" / "scores.parquet"
    assert (done.returncode, done.stdout.strip()) == (0, str(scores))
    assert scores.is_file()
    assert "1 pictures" in typed(tmp_path, *words).stdout


@pytest.mark.parametrize(
    ("typed_words", "words"),
    [
        ("plan", "give --profile or --settings"),
        ("plan --profile nosuch", "profiles: consumer-24gb, embedded, paper, single-gpu"),
        ("evaluate nosuch --system a=b", "neither a folder with metadata.jsonl nor one of"),
        ("evaluate held-out --system a=b", "held-out: "),
        ("generate --prompt x --size 64x64", "trained autoencoder not found at"),
        ("generate --prompt x --size 64x64 --sign", "change into a clone"),
        ("weights verify clip_score", "1 wrong or missing"),
        ("run", "change into a clone"),
    ],
)
def test_what_cannot_work_outside_of_a_clone_is_one_line(
    tmp_path: Path, typed: Typed, typed_words: str, words: str
) -> None:
    done = typed(tmp_path, *typed_words.split())
    assert done.returncode != 0
    assert words in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) <= 1
    assert list(tmp_path.iterdir()) == []


def test_a_plan_and_a_list_of_weights_need_no_clone(tmp_path: Path, typed: Typed) -> None:
    plan = typed(tmp_path, "plan", "--profile", "single-gpu", "--stage", "dit_stage1", "--json")
    assert json.loads(plan.stdout)["stages"][0]["stage"] == "dit_stage1"
    listed = json.loads(typed(tmp_path, "weights", "list", "clip_score", "--json").stdout)
    assert [one["state"] for one in listed["weights"]] == ["missing"]
    assert listed["weights"][0]["command"].startswith("hf download openai/clip-vit-large-patch14")


def test_what_scripts_ask_is_json(root: Path, typed: Typed) -> None:
    stages = json.loads(typed(root, "stage", "list", "--json").stdout)["stages"]
    named = {one["stage"]: one for one in stages}
    assert named["dit_stage2"]["after"] == ["dit_stage1", "latents", "slices", "text_embeddings"]
    assert named["dit_stage2"]["pool"] == "gpu"
    found = typed(root, "doctor", "--json")
    findings = json.loads(found.stdout)["findings"]
    assert {"topic", "verdict", "text", "fix"} == set(findings[0])
    assert found.returncode == any(one["verdict"] == "problem" for one in findings)


def test_a_run_is_silent_or_json(toy: Path, root: Path, typed: Typed) -> None:
    (toy / "params.yaml").write_text((root / "params.yaml").read_text())
    graph = (toy / "dvc.yaml").read_text().replace("params: [value]", "params: [project.seed]")
    (toy / "dvc.yaml").write_text(graph.replace("cp params.yaml data/a", "echo a > data/a"))
    (toy / "data" / "sample").mkdir(parents=True)
    done = json.loads(typed(toy, "run", "--json").stdout)
    assert done["ok"] is True
    assert set(done["stages"]) == set("abcd")
    assert {one["status"] for one in done["stages"].values()} <= {"ran", "skipped"}
    assert typed(toy, "run", "--quiet").stdout == ""


@pytest.mark.slow
def test_a_run_begins_with_what_its_settings_cannot_reach(
    toy: Path, root: Path, typed: Typed
) -> None:
    settings = (root / "params.yaml").read_text()
    (toy / "params.yaml").write_text(settings.replace("warmup_steps: 20", "warmup_steps: 2000"))
    graph = (toy / "dvc.yaml").read_text().replace("params: [value]", "params: [project.seed]")
    (toy / "dvc.yaml").write_text(graph.replace("  a:\n", "  dit_stage1:\n"))
    (toy / "data" / "sample").mkdir(parents=True)
    said = typed(toy, "run", "--until", "dit_stage1").stdout.splitlines()
    assert said[0].startswith("warning: dit_stage1: warmup_steps 2000 exceeds steps 900: ")
    assert "warning" not in typed(toy, "run", "--until", "dit_stage1").stdout


def test_remarks_of_libraries_on_each_other_are_no_part_of_an_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flows import environment

    environment.prepare()
    environment.prepare()
    for name in environment._REMARKS:
        logger = logging.getLogger(name)
        logger.warning("a remark of %s", name)
        logger.error("an error of %s", name)
        assert logger.filters.count(environment._is_more_than_a_remark) == 1
    assert [record.message for record in caplog.records] == [
        f"an error of {name}" for name in environment._REMARKS
    ]


@pytest.mark.parametrize("place", ["components.py", "components/__init__.py"])
def test_another_projects_packages_of_our_names_are_not_imported(
    root: Path, tmp_path: Path, place: str
) -> None:
    for text, path in {
        "": tmp_path / "flows" / "__init__.py",
        "raise RuntimeError('another project')\n": tmp_path / place,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ultraflux"), "stage", "list"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "dit_stage1" in done.stdout


def test_json_is_text_as_it_stands_unless_the_terminal_cannot_show_it() -> None:
    code = (
        "import sys\n"
        "from flows.commands.command_line import print_json\n"
        "sys.stdout.reconfigure(encoding=sys.argv[1], errors='strict')\n"
        "print_json({'name': eval(sys.argv[2])})\n"
    )
    for encoding, name, shown in (
        ("utf-8", "é", "é"),
        ("ascii", "é", "\\u00e9"),
        ("utf-8", "\udcff", "\\udcff"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, encoding, ascii(name)], capture_output=True, check=True
        )
        assert done.stdout.decode("utf-8") == f'{{\n "name": "{shown}"\n}}\n'
