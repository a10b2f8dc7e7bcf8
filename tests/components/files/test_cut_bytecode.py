from __future__ import annotations

import importlib
import os
import py_compile
from pathlib import Path

import pytest

from components.files.cut_bytecode import describe_cut_bytecode, remove_cut_bytecode


@pytest.mark.parametrize("kept", [16, 20, 60])
def test_a_compiled_module_that_was_cut_off_is_removed_and_imported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    module = f"cut_off_{kept}"
    source = tmp_path / f"{module}.py"
    source.write_text("value = [number * 2 for number in range(5)]\n")
    compiled = Path(py_compile.compile(str(source), doraise=True))
    os.truncate(compiled, kept)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((EOFError, ValueError, TypeError)) as problem:
        importlib.import_module(module)
    assert remove_cut_bytecode(problem.value) == compiled
    assert not compiled.exists()
    assert "it is removed: run this again" in describe_cut_bytecode(compiled)
    assert importlib.import_module(module).value == [0, 2, 4, 6, 8]


def test_other_problems_are_left_alone(tmp_path: Path) -> None:
    for wrong in (EOFError("EOF read where not expected"), ValueError("bad marshal data")):
        with pytest.raises(type(wrong)) as problem:
            raise wrong
        assert remove_cut_bytecode(problem.value) is None
    assert remove_cut_bytecode(EOFError("never raised")) is None
