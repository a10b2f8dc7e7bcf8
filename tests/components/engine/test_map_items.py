from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[3]

# Worker functions must be importable in a fresh interpreter, so they live in a module of their own.
WORK = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    import pyarrow as pa
    from components.engine.map_items import EngineLimits, join_shards, map_items

    SCHEMA = pa.schema([("image_id", pa.string()), ("value", pa.int64()), ("error", pa.string())])

    def work(payload):
        kind, number, folder = payload
        with open(Path(folder) / "calls.txt", "a") as file:
            file.write(f"{number}\\n")
        if kind == "exit":
            os._exit(3)
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "hang":
            time.sleep(60)
        if kind == "raises":
            raise RuntimeError(f"no {number}")
        if kind == "greedy":
            return {"value": len(bytearray(1 << 31))}
        if kind == "modest":
            return {"value": len(bytearray(300 << 20))}
        if kind == "once" and not (Path(folder) / "tried").exists():
            (Path(folder) / "tried").touch()
            os._exit(1)
        if kind == "slow":
            time.sleep(0.1)
        return {"value": number * number}

    def go(folder, kinds, workers=2, retries=0, key=None, outside=()):
        limits = EngineLimits(workers=workers, timeout_s=5, memory_mb=512, retries=retries)
        shards = map_items(
            work,
            [f"id{n}" for n in range(len(kinds))],
            ((kind, n, str(folder)) for n, kind in enumerate(kinds)),
            stage="squares",
            key=key or {},
            schema=SCHEMA,
            state_dir=Path(folder) / "shards",
            limits=limits,
            outside=outside,
        )
        join_shards(shards, SCHEMA, Path(folder) / "out.parquet")

    if __name__ == "__main__":
        go(Path(sys.argv[1]), ["slow"] * 40)
    """
)


@pytest.fixture(scope="module")
def work_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "squares_work.py"
    path.write_text(WORK)
    return path


def run(
    work_file: Path, folder: Path, call: str, stderr: int | None = None
) -> list[dict[str, object]]:
    folder.mkdir(exist_ok=True)
    driver = work_file.with_name("driver.py")
    driver.write_text(
        "import sys\nfrom pathlib import Path\nfrom squares_work import go\n"
        f"if __name__ == '__main__':\n    go(Path(sys.argv[1]), {call})\n"
    )
    subprocess.run(
        [sys.executable, driver, folder],
        env=environment(),
        check=True,
        cwd=ROOT,
        timeout=120,
        stderr=stderr,
    )
    return pq.read_table(folder / "out.parquet").to_pylist()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def calls(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "calls.txt").read_text().split()]


def test_every_kind_of_failure_costs_exactly_its_item(work_file: Path, tmp_path: Path) -> None:
    kinds = ["ok", "exit", "ok", "killed", "segfault", "hang", "raises", "greedy", "ok", "modest"]
    rows = run(work_file, tmp_path / "a", repr(kinds))
    assert [row["image_id"] for row in rows] == [f"id{n}" for n in range(10)]
    # The last takes 300 of 512 MiB, beside what its worker held when it was ready.
    values = [0, None, 4, None, None, None, None, None, 64, 300 << 20]
    assert [row["value"] for row in rows] == values
    assert [row["error"] for row in rows if row["error"]] == [
        "quarantined: worker exited with status 3",
        "quarantined: worker killed by SIGKILL",
        "quarantined: worker killed by SIGSEGV",
        "quarantined: no result within 5 s",
        "quarantined: RuntimeError: no 6",
        "quarantined: more than 512 MiB needed",
    ]


def test_a_retry_saves_an_item_that_fails_once(work_file: Path, tmp_path: Path) -> None:
    rows = run(work_file, tmp_path / "a", "['once', 'raises', 'ok'], retries=1")
    assert [row["value"] for row in rows] == [0, None, 4]
    assert sorted(calls(tmp_path / "a")) == [0, 0, 1, 1, 2]


def test_the_number_of_workers_changes_no_byte(work_file: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        run(work_file, tmp_path / str(workers), f"['ok', 'raises'] * 20, workers={workers}")
    one, three = ((tmp_path / name / "out.parquet").read_bytes() for name in ("1", "3"))
    assert one == three


def test_finished_work_is_not_repeated_unless_its_key_changes(
    work_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    run(work_file, folder, "['ok'] * 5, key={'px': 1}")
    run(work_file, folder, "['ok'] * 5, key={'px': 1}")
    assert len(calls(folder)) == 5
    run(work_file, folder, "['ok'] * 5, key={'px': 2}")
    assert len(calls(folder)) == 10


def test_the_third_failure_from_outside_ends_the_run_and_the_next_repeats_no_finished_item(
    work_file: Path, tmp_path: Path
) -> None:
    failing = "['ok'] * 4 + ['raises'] * 60, outside=(RuntimeError,)"
    with pytest.raises(subprocess.CalledProcessError) as ended:
        run(work_file, tmp_path / "a", failing, stderr=subprocess.PIPE)
    *_, last = ended.value.stderr.decode().splitlines()
    assert last.endswith(
        "ItemsFailed: 3 of 64 items failed (no 4); 4 finished ones are kept, run the stage again "
        "for the rest"
    )
    listed = (tmp_path / "a" / "shards" / "failed.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in listed] == [
        {"image_id": f"id{n}", "error": f"RuntimeError: no {n}"} for n in (4, 5, 6)
    ]
    # None of them has become a row, and most have never been tried.
    assert len(calls(tmp_path / "a")) < 32
    (tmp_path / "a" / "calls.txt").unlink()
    rows = run(work_file, tmp_path / "a", "['ok'] * 64")
    assert [row["value"] for row in rows] == [n * n for n in range(64)]
    assert sorted(calls(tmp_path / "a")) == list(range(4, 64))
    assert not (tmp_path / "a" / "shards" / "failed.jsonl").exists()


def test_a_function_that_cannot_be_imported_is_an_error_and_no_endless_restart(
    tmp_path: Path,
) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import os\nfrom components.engine.worker_pool import EngineLimits, WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    def local(item):\n        return item\n"
        "    limits = EngineLimits(workers=1, timeout_s=5, memory_mb=512, retries=0)\n"
        "    list(WorkerPool(local, limits).map([1]))\n"
    )
    done = subprocess.run(
        [sys.executable, script], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert "WorkersDoNotStart: worker processes do not start" in done.stderr


def alive(folder: Path) -> bool:
    """Whether a process started for `folder` (its workers included) still runs."""
    marker = str(folder).encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (process / "environ").read_bytes():
                return True
        except OSError:
            continue
    return False


@pytest.fixture(scope="module")
def undisturbed(work_file: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, str(work_file), folder]
    subprocess.run(command, env=environment(), check=True, timeout=120)
    return (folder / "out.parquet").read_bytes()


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_and_equals_an_undisturbed_one(
    work_file: Path, tmp_path: Path, undisturbed: bytes, how: signal.Signals
) -> None:
    folder = tmp_path
    command = [sys.executable, str(work_file)]
    marked = {**environment(), "ENGINE_TEST": str(folder)}
    process = subprocess.Popen(
        [*command, folder],
        env=marked,
        stderr=subprocess.DEVNULL,
        # A suite that runs in the background ignores SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    deadline = time.monotonic() + 60
    while len(list(folder.glob("shards/*.parquet"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(timeout=30) != 0
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(folder), "workers outlived their parent"
    assert not (folder / "out.parquet").exists()

    before = len(list(folder.glob("shards/*.parquet")))
    assert 5 <= before < 20
    called = len(calls(folder))
    subprocess.run([*command, folder], env=environment(), check=True, timeout=120)
    assert (folder / "out.parquet").read_bytes() == undisturbed
    # Two items a shard: nothing that had reached a shard was computed again.
    assert len(calls(folder)) - called == 40 - 2 * before
