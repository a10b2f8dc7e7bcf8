"""The command `ultraflux judge`."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.files.whole_files import write_text
from flows.commands.command_line import fail, why_no_file, workplace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from components.evaluation.judge.judge import Judgement, Pair

EPILOG = """Examples:

  ultraflux judge --a pictures/ours --b pictures/flux --prompts metadata.jsonl --endpoint
  http://127.0.0.1:8000/v1 --model some/vlm

  ultraflux judge --a ours --b theirs --prompts prompts.txt --endpoint https://... --model ...
  --api-key-env JUDGE_API_KEY --max-cost-usd 5 --input-usd 0.3 --output-usd 2.5 --question detail"""
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"}


def _composed(name: str) -> str:
    # A copy from a Mac has an accent as a character of its own.
    return unicodedata.normalize("NFC", name)


def _pictures(folder: Path, flag: str) -> dict[str, Path]:
    """Pictures of a folder by name without suffix.

    Raises:
        ValueError: no folder, no pictures, or one name twice.
    """
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    found = {_composed(path.stem): path for path in files}
    if not files:
        raise ValueError(f"{flag} {folder}: holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    if len(found) != len(files):
        raise ValueError(
            f"{flag} {folder}: two pictures differ only in their suffix, or in how an accent is "
            "written"
        )
    return found


def _named_prompts(path: Path) -> dict[str, str] | None:
    """Prompts by picture of a `metadata.jsonl` (file_name, text); None for other files.

    A picture goes by its whole path as `ultraflux evaluate` names it, or by its bare name where one
    line has it.

    Raises:
        ValueError: a line, by number, without a name or text, or with another text for a name.
    """
    if path.suffix.lower() != ".jsonl":
        return None
    from components.evaluation.suites.suites import item_name
    from components.generation.prompt_files import json_objects, odd_character

    named: dict[str, str] = {}
    bare: dict[str, set[str]] = {}
    for where, record in json_objects(path.read_text(encoding="utf-8-sig"), path.name):
        if "file_name" not in record:
            return None
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: no text")
        if (odd := odd_character(text)) is not None:
            raise ValueError(f"{where}: not UTF-8 at character {odd} of the text")
        file = PurePosixPath(str(record["file_name"]))
        if not file.name:
            raise ValueError(f"{where}: file_name '{file}' names no file")
        name = item_name(file.with_suffix("").as_posix())
        if named.setdefault(name, text) != text:
            raise ValueError(f"{where}: an earlier line has another text for '{name}'")
        bare.setdefault(item_name(file.stem), set()).add(name)
    alone = {stem: named[min(names)] for stem, names in bare.items() if len(names) == 1}
    return alone | named


def read_pairs(a: Path, b: Path, prompts: Path) -> list[Pair]:
    """Pictures of the same name in both folders, each with its prompt.

    Args:
        a: folder of the first system.
        b: folder of the second one.
        prompts: `metadata.jsonl` with file_name and text; or a file of prompts, of which the i-th
            belongs to the i-th picture by name, 2 before 10.

    Raises:
        ValueError: a picture without partner or prompt, or an unreadable file.
    """
    from components.evaluation.judge.judge import Pair
    from components.evaluation.suites.suites import item_name
    from components.files.natural_order import natural_key
    from components.generation.prompt_files import read_prompts

    first, second = _pictures(a, "--a"), _pictures(b, "--b")
    if alone := sorted(set(first) ^ set(second)):
        raise ValueError(
            f"{len(alone)} pictures have no partner of the same name, such as {alone[0]}"
        )
    if not prompts.is_file():
        raise ValueError(f"--prompts {prompts}: {why_no_file(prompts)}")
    named = _named_prompts(prompts)
    names = sorted(first, key=natural_key)
    if named is None:
        lines = [line.prompt for line in read_prompts(prompts)]
        if len(lines) != len(names):
            raise ValueError(
                f"{prompts.name} holds {len(lines)} prompts for {len(names)} pictures; give a "
                "metadata.jsonl with file_name and text"
            )
        texts = dict(zip(names, lines, strict=True))
    else:
        keys = {name: item_name(name) for name in names}
        texts = {name: named[key] for name, key in keys.items() if key in named}
    if without := [name for name in names if name not in texts]:
        raise ValueError(
            f"{prompts.name}: {len(without)} pictures have no prompt, or their name several, such "
            f"as {without[0]}"
        )
    return [Pair(name, texts[name], first[name], second[name]) for name in names]


def _calibrate(
    pairs: Sequence[Pair],
    questions: Sequence[str],
    output: Path,
    ask: Callable[[Sequence[Pair], Sequence[str]], list[Judgement]],
) -> None:
    """Stop before the run where the judge does not see a blur.

    Raises:
        JudgeStopped: it failed a planted pair.
    """
    from components.evaluation.judge.calibration import QUESTIONS, failure, planted_pairs
    from components.evaluation.judge.judge import JudgeStopped

    asked = [name for name in questions if name in QUESTIONS]
    planted = planted_pairs(pairs, output / "calibration") if asked else []
    if not planted:
        print("calibration: no question or picture that a blur would decide; not calibrated")
        return
    judgements = ask(planted, asked)
    if problem := failure(judgements):
        raise JudgeStopped(f"{problem}; take another judge, or go on with --no-calibrate")
    print(f"calibration: all {len(judgements)} planted pairs right")


def judge(
    a: Annotated[Path, typer.Option("--a", help="Folder of pictures of system A.")],
    b: Annotated[Path, typer.Option("--b", help="The same prompts by system B, same names.")],
    prompts: Annotated[Path, typer.Option(help="metadata.jsonl, or prompts in order of names.")],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible base URL, ends in /v1.")],
    model: Annotated[str, typer.Option(help="Model that sees pictures.")],
    question: Annotated[
        list[str] | None, typer.Option(help="aesthetics, alignment, detail (default: all).")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Exact text to ask, in place of one built-in question.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key.")
    ] = None,
    max_cost_usd: Annotated[float | None, typer.Option(help="Cap over all runs.")] = None,
    input_usd: Annotated[float | None, typer.Option(help="USD per million tokens sent.")] = None,
    output_usd: Annotated[float | None, typer.Option(help="USD per million written.")] = None,
    requests_per_minute: Annotated[float, typer.Option(help="Rate limit.")] = 60.0,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 120.0,
    retries: Annotated[int, typer.Option(help="After 429, 5xx or a lost connection.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Of one answer.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="First ask about pictures and their blurred twins, which must lose; default: "
            "where requests have a price.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for results and cache.")] = Path("judged"),
) -> None:
    """Compare two folders of pictures by a vision-language model, in both orders."""
    from pydantic import ValidationError

    from components.chat.client import EndpointUnusable
    from components.evaluation.judge.judge import JudgeStopped, judge_pairs, summarise
    from components.evaluation.judge.prompts import QUESTIONS, judge_prompt
    from components.evaluation.suites.result_folder import finite
    from components.settings.captions import EndpointSettings
    from components.settings.field_errors import first_error

    workplace()
    questions = list(dict.fromkeys(question or QUESTIONS))
    try:
        if max_cost_usd is not None and not 0.0 <= max_cost_usd < math.inf:
            raise ValueError(f"--max-cost-usd {max_cost_usd:g}: a sum of money from 0")
        if max_cost_usd is not None and None in (input_usd, output_usd):
            raise ValueError("--max-cost-usd needs --input-usd and --output-usd (0 for your own)")
        if prompt_file is not None and len(questions) != 1:
            raise ValueError("--prompt-file needs exactly one --question, whose name it takes")
        pairs = read_pairs(a, b, prompts)
        settings = EndpointSettings(
            base_url=endpoint,
            model=model,
            api_key_env=api_key_env,
            temperature=0.0,
            max_tokens=max_tokens,
            seed=seed,
            reasoning_effort=None,
            requests_per_minute=requests_per_minute,
            concurrency=concurrency,
            timeout_s=timeout,
            retries=retries,
            input_usd_per_million=input_usd,
            output_usd_per_million=output_usd,
        )

        def ask(shown: Sequence[Pair], names: Sequence[str]) -> list[Judgement]:
            return list(
                judge_pairs(
                    shown,
                    names,
                    settings,
                    cache=output / "answers.sqlite",
                    max_cost_usd=max_cost_usd,
                    prompt_file=prompt_file,
                )
            )

        if calibrate or (calibrate is None and (input_usd or output_usd)):
            _calibrate(pairs, questions, output, ask)
        judgements = ask(pairs, questions)
    except ValidationError as problem:
        raise fail(first_error(problem, verbatim=True)) from None
    except (ValueError, EndpointUnusable) as problem:
        raise fail(str(problem)) from None
    except JudgeStopped as problem:
        raise fail(str(problem), 1) from None
    summary: dict[str, Any] = {
        "model": model,
        "pairs": len(pairs),
        "a": a.resolve().name,
        "b": b.resolve().name,
        "questions": finite(summarise(judgements)),
    }
    for name, part in summary["questions"].items():
        part["prompt"] = judge_prompt(name, prompt_file).version
    rows = [
        {
            "question": one.question,
            "picture": one.pair.name,
            "prompt": one.pair.prompt,
            "outcome": one.outcome,
            "a_first": one.a_first and one.a_first.model_dump(),
            "b_first": one.b_first and one.b_first.model_dump(),
            "problem": one.problem,
        }
        for one in judgements
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(output / "judgements.jsonl", lines)
    text = json.dumps(summary, indent=1, allow_nan=False)
    write_text(output / "summary.json", text + "\n")
    print(text)
    for name, part in summary["questions"].items():
        for line in part["warnings"]:
            typer.echo(f"warning: {name}: {line}", err=True)
        if part["repaired"]:
            kinds = ", ".join(f"{kind} {count}" for kind, count in part["repairs"].items())
            typer.echo(
                f"note: {name}: {part['repaired']} of {part['answers']} answers were not as asked "
                f"and repaired ({kinds})",
                err=True,
            )
    unanswered = [row for row in rows if row["outcome"] == "unanswered"]
    if unanswered:
        # Those with an answer stay in the cache and in the results.
        which = "no pair was answered"
        if len(unanswered) < len(rows):
            which = f"{len(unanswered)} of {len(rows)} judgements have no answer"
        raise fail(f"{which}: {unanswered[0]['problem']}; run it again to ask again", 1)
