from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.files.whole_files import (
    NotRegularFile,
    regular_bytes,
    whole_file,
    whole_folder,
    write_bytes,
    write_text,
)


def fail_after_writing(path: Path) -> None:
    path.write_text("half")
    (path / "below a file").touch()


@pytest.mark.parametrize("durable", [False, True])
def test_a_written_file_has_the_bytes_and_leaves_nothing_beside_it(
    tmp_path: Path, durable: bool
) -> None:
    write_text(tmp_path / "text", "grün\n", durable=durable)
    write_bytes(tmp_path / "bytes", b"\x00\xff", durable=durable)
    write_bytes(tmp_path / "bytes", b"\x01", durable=durable)
    assert (tmp_path / "text").read_bytes() == "grün\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x01"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text("before")
    synced: list[tuple[Path, str]] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), path.read_text()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_text(path, "quick")
    assert synced == []
    write_text(path, "after", durable=True)
    (written, then), named = synced
    # After a power cut there is the former file or the whole new one, never an empty one.
    assert (written.parent, then) == (tmp_path, "quick")
    assert written != path
    assert named == (tmp_path, "after")


def test_an_error_keeps_the_former_file_and_removes_the_half_written_one(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    write_text(path, "before")
    with pytest.raises(NotADirectoryError), whole_file(path) as temporary:
        fail_after_writing(temporary)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_wrote_nothing_is_an_error_and_not_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "empty"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_text(tmp_path / "nowhere" / "page.html", "")


def test_a_kill_in_the_middle_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_text(path, "step-1")
    code = (
        "import os, sys; from pathlib import Path\n"
        "from components.files.whole_files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('ste'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text() == "step-1"
    write_text(path, "step-2")
    assert [file.name for file in tmp_path.iterdir()] == ["latest"]


def test_processes_that_replace_one_file_use_names_of_their_own(tmp_path: Path) -> None:
    with whole_file(tmp_path / "shared", contended=True) as temporary:
        assert temporary.parent == tmp_path
        assert str(os.getpid()) in temporary.name
        temporary.touch()


def test_a_pipe_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("pipe")
    for path in (pipe, link):
        for follow in (False, True):
            with pytest.raises(NotRegularFile) as found:
                write_text(path, "page", follow=follow)
            assert found.value.filename == str(path)
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == [link, pipe]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_that_a_person_names_stays_and_one_into_a_cache_gives_way(
    tmp_path: Path, there: bool
) -> None:
    kept, link = tmp_path / "cache" / "kept", tmp_path / "link"
    kept.parent.mkdir()
    if there:
        kept.write_text("before")
    link.symlink_to("cache/kept")
    write_text(link, "named", follow=True)
    assert link.is_symlink()
    assert kept.read_text() == "named"
    write_text(link, "own")
    assert not link.is_symlink()
    assert (link.read_text(), kept.read_text()) == ("own", "named")
    assert list(kept.parent.iterdir()) == [kept]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    for name in ("old", "new"):
        with whole_folder(path) as filled:
            (filled / name).touch()
            assert not (path / name).exists()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(path.parent.iterdir()) == [path]


def test_what_a_failed_folder_left_behind_is_not_in_the_next(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(NotADirectoryError), whole_folder(path) as filled:
        fail_after_writing(filled / "half")
    assert list(tmp_path.iterdir()) == []
    with whole_folder(path) as filled:
        (filled / "whole").touch()
    assert [file.name for file in path.iterdir()] == ["whole"]


def test_bytes_are_those_of_regular_files_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "link").symlink_to("file")
    assert regular_bytes(tmp_path / "link") == b"x" * 100_000
    # Nobody writes: a reader would wait for ever.
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(NotRegularFile) as found:
            regular_bytes(odd)
        assert found.value.strerror == "not a regular file"
    with pytest.raises(IsADirectoryError):
        regular_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        regular_bytes(tmp_path / "none")
