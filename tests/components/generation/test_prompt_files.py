"""Prompt files: three formats, defaults, and errors by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.generation.prompt_files import PromptLine, read_prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"prompt": "a, b", "size": "64x32", "seed": 3}\n\n{"prompt": "湖\\u2028x"}\n'),
        ("p.csv", '\ufeffprompt,Size,seed\n"a, b",64x32,3\n湖\u2028x,,,\n'),
    ],
)
def test_objects_and_tables_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    expected = [PromptLine("a, b", "64x32", 3), PromptLine("湖\u2028x")]
    assert read_prompts(tmp_path / name) == expected


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "p.txt") == [PromptLine("one"), PromptLine("two")]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', r"p\.jsonl line 2: not JSON"),
        ("p.jsonl", "[1]", "line 1: expected an object"),
        ("p.jsonl", '{"prompt": ""}', "line 1: no prompt"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed must be a whole number"),
        ("p.jsonl", r'{"prompt": "caf\udce9"}', "line 1: prompt: not UTF-8 at character 4"),
        ("p.jsonl", '{"prompt": ' + "[" * 200_000, "line 1: too deeply nested"),
        ("p.jsonl", '{"seed": ' + "9" * 5000 + "}", "line 1: a number with too many digits"),
        ("p.csv", "prompt,seed\na,x\n", "line 2: seed must be a whole number"),
        ("p.csv", "prompt\na fox, red, in snow\n", "line 2: 3 cells for 1 column; put quotes aro"),
        ("p.csv", "prompt,seed, Prompt\na,1,b\n", "two columns are named prompt"),
        ("p.csv", 'prompt\nx\n"a\nb\nc\n', "line 3: not CSV: unexpected end of data"),
        ("p.csv", 'prompt,seed\n"a\nb",1,2\n', "line 2: 3 cells for 2 columns"),
        ("p.csv", '"prompt' + "\na fox" * 30_000, "no column named prompt"),
        ("p.csv", "text\na\n", "no column named prompt"),
        ("p.txt", "\n", "holds no prompt"),
        ("p.yaml", "a", "ends in .txt, .jsonl, .csv"),
    ],
)
def test_bad_files_are_named_with_the_line(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_prompts(tmp_path / name)
