"""Systems under test: folders, references, commands, and how they are written."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from components.evaluation.suites.command_system import CommandSystem
from components.evaluation.suites.suites import SuiteItem
from components.evaluation.suites.system import References, Sampling, SystemFailed
from components.evaluation.suites.systems import (
    PRESETS,
    FolderSystem,
    PipelineSystem,
    UltraFluxSystem,
    parse_system,
)
from components.files.weight_folders import WeightsMissing
from components.settings.schema import Settings, load_settings

ITEMS = [
    SuiteItem("lake", "a lake", 32, 64, 1),
    SuiteItem("hill", "a hill 'with' \"quotes\" {out}", 32, 64, 2),
    SuiteItem("tall", "a tower", 64, 32, 3),
]


@pytest.fixture(scope="module")
def settings(root: Path) -> Settings:
    return load_settings(root / "params.yaml")


def paint(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 32)).save(folder / name)
    return folder


def test_a_folder_is_matched_by_name(tmp_path: Path) -> None:
    folder = paint(tmp_path, "lake.png", "hill.jpg", "tall.webp", "more.png")
    system = FolderSystem("mine", folder)
    found = system.pictures(ITEMS, tmp_path)
    assert [path.name for path in found] == ["lake.png", "hill.jpg", "tall.webp"]
    left_out = "1 of 4 pictures have no item's name and were left out, such as more.png"
    assert system.remarks == (left_out,)


def test_a_folder_with_other_names_is_matched_by_order_if_the_numbers_agree(tmp_path: Path) -> None:
    folder = paint(tmp_path, "02.png", "10.png", "01.png")
    found = FolderSystem("mine", folder).pictures(ITEMS, tmp_path)
    assert [path.name for path in found] == ["01.png", "02.png", "10.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("lake.png", "hill.png", "x.png"), "2 match by name and these do not: tall"),
        (("1.png", "2.png"), "2 pictures for 3 items; 0 match"),
        (("lake.png", "lake.jpg"), r"lake.jpg and lake.png .* both for 'lake'"),
    ],
)
def test_a_folder_that_does_not_fit_is_explained(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemFailed, match=message):
        FolderSystem("mine", paint(tmp_path, *names)).pictures(ITEMS, tmp_path)


PAINTER = """
import json, os, sys
from pathlib import Path
from PIL import Image
prompts, out, size, stop_after, log = sys.argv[1:]
width, height = map(int, size.split("x"))
for number, line in enumerate(Path(prompts).read_text().splitlines()):
    if number == int(stop_after):
        print("out of memory", file=sys.stderr)
        sys.exit(3)
    wanted = json.loads(line)
    assert (wanted["width"], wanted["height"]) == (width, height)
    image = Image.new("RGB", (width, height), (wanted["seed"], 0, 0))
    image.save(Path(out) / wanted["file"])
    with open(log, "a") as file:
        file.write(wanted["prompt"] + "\\n")
"""


def painter(tmp_path: Path, stop_after: int, size: str = "{width}x{height}") -> CommandSystem:
    script = tmp_path / "my painter.py"
    script.write_text(PAINTER)
    words = [sys.executable, str(script), "{prompts}", "{out}", size, str(stop_after)]
    return CommandSystem("mine", f"{shlex.join(words)} {shlex.quote(str(tmp_path / 'log'))}")


def test_a_command_makes_every_picture_once(tmp_path: Path) -> None:
    system = painter(tmp_path, stop_after=9)
    paths = system.pictures(ITEMS, tmp_path / "out")
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append((image.size, image.getpixel((0, 0))))
    assert sizes == [((64, 32), (1, 0, 0)), ((64, 32), (2, 0, 0)), ((32, 64), (3, 0, 0))]
    assert system.pictures(ITEMS, tmp_path / "out") == paths
    made = (tmp_path / "log").read_text().splitlines()
    assert sorted(made) == sorted(item.prompt for item in ITEMS)
    other_seed = [SuiteItem("lake", "a lake", 32, 64, 7)]
    assert system.pictures(other_seed, tmp_path / "out") != paths[:1]


def test_a_command_that_fails_is_asked_for_the_rest_only(tmp_path: Path) -> None:
    system = painter(tmp_path, stop_after=1)
    with pytest.raises(
        SystemFailed,
        match=r"code 3 \(out of memory\); \S+ was not written; 1 of 2 pictures are kept, run again "
        "for the rest$",
    ):
        system.pictures(ITEMS, tmp_path / "out")
    paths = system.pictures(ITEMS[:2], tmp_path / "out")
    assert all(path.exists() for path in paths)
    assert (tmp_path / "log").read_text().splitlines() == [i.prompt for i in ITEMS[:2]]


def test_what_a_command_leaves_running_is_ended_and_not_waited_for(tmp_path: Path) -> None:
    script, pid = tmp_path / "leave.sh", tmp_path / "pid"
    script.write_text(f'"$@"\nsleep 60 &\necho $! > {pid}\necho bad luck >&2\nexit 4\n')
    system = CommandSystem("mine", f"sh {script} {painter(tmp_path, 9).template}")
    started = time.monotonic()
    with pytest.raises(
        SystemFailed,
        match=r"code 4 \(bad luck\); 2 of 2 pictures are kept, run again to measure them$",
    ):
        system.pictures(ITEMS[:2], tmp_path / "out")
    assert time.monotonic() - started < 30
    # Ended; who adopted it may not have waited for it yet.
    stat = Path(f"/proc/{int(pid.read_text())}/stat")
    assert not stat.exists() or ") Z " in stat.read_text()


def test_a_second_interrupt_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, pid = tmp_path / "stay.sh", tmp_path / "pid"
    script.write_text(f"trap '' TERM\nsleep 60 &\necho $! > {pid}\n")
    system = CommandSystem("mine", f"sh {script} {{prompts}} {{out}}")
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            system.pictures(ITEMS[:1], tmp_path)
    stat = Path(f"/proc/{int(pid.read_text())}/stat")
    until = time.monotonic() + 5
    while stat.exists() and ") Z " not in stat.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_may_not_be_ended_costs_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "killpg", Mock(side_effect=PermissionError))
    (path,) = painter(tmp_path, 9).pictures(ITEMS[:1], tmp_path / "out")
    assert path.exists()


def test_pictures_that_a_killed_run_left_behind_are_taken_unless_torn(tmp_path: Path) -> None:
    system = painter(tmp_path, stop_after=9)
    out = tmp_path / "out"
    paths = system.pictures(ITEMS[:2], out)
    left = out / ".incoming_64x32" / "pictures"
    left.mkdir(parents=True)
    paths[0].rename(left / paths[0].name)
    data = paths[1].read_bytes()
    paths[1].unlink()
    (left / paths[1].name).write_bytes(data[: len(data) // 2])
    (tmp_path / "log").unlink()
    system.pictures(ITEMS[:2], out)
    assert (tmp_path / "log").read_text().splitlines() == [ITEMS[1].prompt]


def test_wrong_sizes_missing_pictures_and_missing_programs_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemFailed, match=r"Error|ended with code"):
        painter(tmp_path, 9, size="16x16").pictures(ITEMS[:1], tmp_path / "out")
    quiet = CommandSystem("mine", f"{sys.executable} -c pass {{prompts}} {{out}}")
    with pytest.raises(SystemFailed, match=r"lake_.*png was not written; 0 of 1"):
        quiet.pictures(ITEMS[:1], tmp_path / "quiet")
    code = (
        "import json,sys;from PIL import Image;"
        "Image.new('RGB',(8,8)).save(sys.argv[2]+'/'+json.loads(open(sys.argv[1]).read())['file'])"
    )
    small = CommandSystem("mine", f"{sys.executable} -c {shlex.quote(code)} {{prompts}} {{out}}")
    with pytest.raises(SystemFailed, match="is 8x8, asked for 64x32"):
        small.pictures(ITEMS[:1], tmp_path / "small")
    absent = CommandSystem("mine", "no-such-program {prompts} {out}")
    with pytest.raises(SystemFailed, match="does not start: no-such-program"):
        absent.pictures(ITEMS[:1], tmp_path / "absent")
    with pytest.raises(ValueError, match=r"lacks \{out\}"):
        CommandSystem("mine", "x {prompts}")


def test_references_are_a_system(tmp_path: Path) -> None:
    item = SuiteItem("a", "b", 1, 1, 0, tmp_path / "a.png")
    assert References("photos").pictures([item], tmp_path) == [tmp_path / "a.png"]
    with pytest.raises(SystemFailed, match="1 items have no reference"):
        References("photos").pictures([item, ITEMS[0]], tmp_path)


def test_systems_are_written_name_equals_spec(tmp_path: Path, settings: Settings) -> None:
    def parse(text: str) -> object:
        return parse_system(text, tmp_path, settings, Sampling())

    folder = paint(tmp_path / "pictures", "a.png")
    assert parse(f"mine={folder}") == FolderSystem("mine", folder)
    assert parse("photos=references") == References("photos")
    assert parse("c=command:x {prompts} {out} a=b") == CommandSystem("c", "x {prompts} {out} a=b")
    assert isinstance(parse("ours=trained"), UltraFluxSystem)
    for name, preset in PRESETS.items():
        system = parse(f"{name}={name}")
        kinds = {"ultraflux": UltraFluxSystem, "diffusers": PipelineSystem}
        assert isinstance(system, kinds[preset.kind])
        with pytest.raises(WeightsMissing, match="hf download"):
            system.pictures(ITEMS, tmp_path / "out")
    for bad in ("mine", "=x", "mine=", "../x=references", "mine=no-such"):
        with pytest.raises(ValueError, match="--system"):
            parse(bad)


def test_numbers_without_leading_zeros_are_matched_by_value_and_said(tmp_path: Path) -> None:
    items = [SuiteItem(f"scene_{n:02d}", "a", 32, 64, n) for n in range(12)]
    system = FolderSystem("mine", paint(tmp_path, *(f"{n}.png" for n in range(12))))
    found = system.pictures(items, tmp_path)
    assert [path.stem for path in found] == [str(n) for n in range(12)]
    (remark,) = system.remarks
    assert "matched by their order" in remark
    assert "11.png is item scene_11" in remark
    named = FolderSystem("mine", paint(tmp_path / "named", *(f"{i.id}.png" for i in items)))
    named.pictures(items, tmp_path)
    assert named.remarks == ()


LEVEL = """
import json, os, sys
from pathlib import Path
from PIL import Image
import shade
level = int(Path("WEIGHTS").read_text()) + shade.MORE + int(os.environ.get("MY_SHADE", "0"))
for line in Path(sys.argv[1]).read_text().splitlines():
    wanted = json.loads(line)
    size = wanted["width"], wanted["height"]
    Image.new("RGB", size, (level, 0, 0)).save(Path(sys.argv[2]) / wanted["file"])
"""


def test_a_command_whose_program_weights_or_environment_changed_makes_its_pictures_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, beside = tmp_path / "weights.txt", tmp_path / "shade.py"
    weights.write_text("10")
    beside.write_text("MORE = 0")
    script = tmp_path / "my.py"
    script.write_text(LEVEL.replace("WEIGHTS", str(weights)))
    system = CommandSystem("m", f"{sys.executable} {script} {{prompts}} {{out}}")

    def level() -> int:
        (path,) = system.pictures(ITEMS[:1], tmp_path / "out")
        with Image.open(path) as image:
            pixel = image.getpixel((0, 0))
        assert isinstance(pixel, tuple)
        return int(pixel[0])

    assert level() == 10
    assert system.remarks == ()
    assert level() == 10
    assert "1 of 1 pictures are those of an earlier run" in system.remarks[0]
    weights.write_text("11")
    assert level() == 11
    beside.write_text("MORE = 100")
    assert level() == 111
    monkeypatch.setenv("MY_SHADE", "5")
    assert level() == 116
    assert system.remarks == ()
