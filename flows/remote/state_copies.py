"""What an unfinished stage has saved, copied to the DVC remote: another machine goes on from there.

A clone that is lost takes its `runs/` with it. While a resumable stage runs for a pipeline
elsewhere, the newest checkpoint, the metrics up to it, finished shards of the corpus stages and
sample pictures are copied to `state/<stage>/<stage_key>/<writer>/` beside DVC's own files; whoever
is sent the stage next begins with them. They go when the stage's outputs have been pushed.

Every clone writes below a name of its own, so one that was given up, but still runs, cannot mix its
files into another's. A checkpoint counts once `latest` names it, which is sent last. What is left
out (journals of downloads, encoded latents, the caches of services) is computed again.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.files.whole_files import whole_file
from components.training.distributed.checkpoint_folders import LATEST_FILE, WRITING, age
from components.training.distributed.run_states import CHECKPOINTS, METRICS_FILE, STATE_FILE
from flows.remote import data_remote
from flows.running.training_state import stage_state_folder
from flows.versioning import graph as versioning

SWITCH = "ULTRAFLUX_STATE_COPIES"
"""Environment variable; `off`: a stage of a lost clone begins again."""
PERIOD_S = 5.0
FOLDER = "state"
# They tell a checkpoint's past: its curves, and under which settings its steps were made.
_BESIDE = (METRICS_FILE, STATE_FILE)
# Written aside and renamed by their stages, so a file that is there is whole.
WHOLE_FILES = (".parquet", ".png")
# Links to the checkpoint in transfer: retention must not take it away.
_COPYING = ".copying-"


def copies_wanted() -> bool:
    """Whether state is copied at all."""
    return os.environ.get(SWITCH, "").lower() != "off"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)  # a file system without hard links


@dataclass(frozen=True)
class _Place:
    """A folder of the remote."""

    fs: Any
    path: str

    def files(self) -> list[str]:
        """Paths below the folder."""
        # Object stores cache listings, and other clones write here meanwhile.
        self.fs.fs.invalidate_cache()
        if not self.fs.exists(self.path):
            return []
        start = self.path.rstrip("/") + "/"
        names = (str(file).removeprefix(start) for file in self.fs.find(self.path))
        # A key of an object store may be any text; none may lead out of the stage's folder.
        return sorted(name for name in names if ".." not in name.split("/"))

    def join(self, *parts: str) -> str:
        return str(self.fs.join(self.path, *parts))

    def put(self, file: Path, *parts: str) -> None:
        target = self.join(*parts)
        self.fs.makedirs(self.fs.parent(target), exist_ok=True)
        self.fs.put_file(str(file), target)

    def get(self, name: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file, contended=True) as temporary:
            self.fs.get_file(self.join(name), str(temporary))

    def remove(self, *parts: str) -> None:
        if self.fs.exists(target := self.join(*parts)):
            self.fs.rm(target, recursive=True)


def _place(repo: Any, *parts: str) -> _Place:
    remote = repo.cloud.get_remote()
    return _Place(remote.fs, str(remote.fs.join(remote.path, FOLDER, *parts)))


def _text(place: _Place, name: str) -> str:
    return str(place.fs.read_text(place.join(name), encoding="utf-8")).strip()


class StateCopies:
    """Copies of one stage's state, under the key that its inputs and settings give it."""

    def __init__(self, root: Path, stage: str) -> None:
        """For the clone at `root`, whose inputs of `stage` are in place."""
        self.folder = stage_state_folder(root, stage)
        self._root = root
        self._parts = (stage, self.folder.name)
        # Drawn, not the host's name: two clones of one machine are two writers.
        self._writer = uuid.uuid4().hex[:12]
        self._newest = ""
        self._sent: dict[str, tuple[int, int]] = {}
        self._stopped = threading.Event()

    def restore(self) -> str | None:
        """Bring what other clones saved and this one lacks; returns the checkpoint brought.

        Raises:
            RemoteFailed: the remote is unreachable for as long as patience lasts.
        """
        return data_remote.patiently(self._root, "copies of state", self._restore)

    def _restore(self, repo: Any) -> str | None:
        place = _place(repo, *self._parts)
        files = place.files()
        self._restore_whole_files(place, files)
        pointers = [name for name in files if name.endswith(f"/{CHECKPOINTS}/{LATEST_FILE}")]
        named = {name.partition("/")[0]: _text(place, name) for name in pointers}
        pointer = self.folder / CHECKPOINTS / LATEST_FILE
        here = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
        writer = max(named, key=lambda one: age(named[one]), default=None)
        # This clone may have worked on the stage itself: what it has is never replaced by less.
        if writer is None or age(named[writer]) <= age(here):
            return None
        checkpoint = named[writer]
        # Again: one that still arrived when they were listed may be what the pointer names since.
        files = place.files()
        start = f"{writer}/{CHECKPOINTS}/{checkpoint}/"
        aside = self.folder / CHECKPOINTS / f"{WRITING}{checkpoint}"
        shutil.rmtree(aside, ignore_errors=True)
        for name in (name for name in files if name.startswith(start)):
            place.get(name, aside / name.removeprefix(start))
        target = self.folder / CHECKPOINTS / checkpoint
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        # The pointer last: killed anywhere above, the clone still resumes from what it had.
        for file in _BESIDE:
            if f"{writer}/{file}" in files:
                place.get(f"{writer}/{file}", self.folder / file)
        place.get(f"{writer}/{CHECKPOINTS}/{LATEST_FILE}", pointer)
        return checkpoint

    def _restore_whole_files(self, place: _Place, files: list[str]) -> None:
        for name in files:
            inside = name.partition("/")[2]
            if inside.endswith(WHOLE_FILES) and not (self.folder / inside).exists():
                place.get(name, self.folder / inside)

    @contextmanager
    def kept_up(self, say: Callable[[str], None]) -> Iterator[None]:
        """Copy in a thread while the block runs; the file in transfer at its end is the last.

        Args:
            say: told once per outage of the remote, which costs copies, never the stage.
        """
        with versioning.open_repo(self._root) as repo:
            place = _place(repo, *self._parts, self._writer)
        for left in self.folder.glob(f"{_COPYING}*"):  # of a clone that was killed
            shutil.rmtree(left, ignore_errors=True)
        told = False

        def attempt() -> None:
            nonlocal told
            try:
                self._save(place)
            except Exception as problem:
                if not told:
                    reason = " ".join(str(problem).split()) or type(problem).__name__
                    say(f"{self._parts[0]}: state is not copied to the remote: {reason}")
                told = True
            else:
                told = False

        def watch() -> None:
            while not self._stopped.wait(PERIOD_S):
                attempt()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()
            self._stopped.clear()

    def save(self) -> None:
        """Copy what is new."""
        with versioning.open_repo(self._root) as repo:
            self._save(_place(repo, *self._parts, self._writer))

    def _save(self, place: _Place) -> None:
        for file in sorted(self.folder.rglob("*")):
            if self._stopped.is_set():
                return
            name = file.relative_to(self.folder)
            if file.suffix in WHOLE_FILES and not any(part.startswith(".") for part in name.parts):
                self._put_if_new(place, file, name)
        pointer = self.folder / CHECKPOINTS / LATEST_FILE
        newest = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
        if newest and newest != self._newest:
            self._save_checkpoint(place, newest)

    def _put_if_new(self, place: _Place, file: Path, name: Path) -> None:
        try:
            found = file.stat()
            state = (found.st_size, found.st_mtime_ns)
            if self._sent.get(str(name)) != state:
                place.put(file, *name.parts)
                self._sent[str(name)] = state
        except FileNotFoundError:
            pass  # the stage has removed it since

    def _save_checkpoint(self, place: _Place, newest: str) -> None:
        source, aside = (
            self.folder / CHECKPOINTS / newest,
            self.folder / f"{_COPYING}{self._writer}",
        )
        try:
            shutil.copytree(source, aside, copy_function=_link, dirs_exist_ok=True)
        except (FileNotFoundError, shutil.Error):
            shutil.rmtree(aside, ignore_errors=True)
            return  # retention was faster; there is a newer one
        try:
            files = sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
            for name in files:
                if self._stopped.is_set():
                    return
                place.put(aside / name, CHECKPOINTS, newest, *name.parts)
            # After the checkpoint: it may know more steps than the checkpoint, never fewer.
            for file in _BESIDE:
                if (self.folder / file).is_file():
                    place.put(self.folder / file, file)
            pointer = aside / LATEST_FILE
            pointer.write_text(f"{newest}\n", encoding="utf-8")
            place.put(pointer, CHECKPOINTS, LATEST_FILE)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        before, self._newest = self._newest, newest
        # Only after the new pointer: until then the old checkpoint is what a reader finds.
        if before:
            place.remove(CHECKPOINTS, before)

    def drop(self) -> None:
        """Remove the copies, of all clones: the outputs are safe."""
        data_remote.patiently(
            self._root, "copies of state", lambda repo: _place(repo, *self._parts).remove()
        )


@dataclass(frozen=True)
class KeptCopies:
    """Of one stage under one key."""

    stage: str
    stage_key: str
    checkpoint: str
    """The newest, empty where no checkpoint was saved."""
    size_bytes: int


def kept_copies(root: Path) -> list[KeptCopies]:
    """What the remote keeps of unfinished stages.

    Raises:
        RemoteFailed: the remote is unreachable for as long as patience lasts.
    """

    def look(repo: Any) -> list[KeptCopies]:
        place = _place(repo)
        found: dict[tuple[str, str], KeptCopies] = {}
        for name in place.files():
            stage, key, *inside = name.split("/") if name.count("/") > 1 else ("", "")
            if not inside:
                continue  # not ours
            known = found.get((stage, key), KeptCopies(stage, key, "", 0))
            pointer = _text(place, name) if inside[1:] == [CHECKPOINTS, LATEST_FILE] else ""
            found[stage, key] = KeptCopies(
                stage,
                key,
                max(known.checkpoint, pointer, key=age),
                known.size_bytes + int(place.fs.size(place.join(name)) or 0),
            )

        return sorted(found.values(), key=lambda one: (one.stage, one.stage_key))

    return data_remote.patiently(root, "copies of state", look)


def drop_all(root: Path) -> None:
    """Remove every copy on the remote, also of stages that run just now.

    Raises:
        RemoteFailed: the remote is unreachable for as long as patience lasts.
    """
    data_remote.patiently(root, "copies of state", lambda repo: _place(repo).remove())
