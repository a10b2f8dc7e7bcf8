"""Captions and translations by models: ask, check, ask once more, record.

Answers arrive in any order and results stand in the order of the images. What failed is a status,
never a lost row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from components.chat.client import (
    ChatClient,
    EndpointUnusable,
    Question,
    RequestFailed,
)
from components.chat.prompts import Prompt, clean_answer
from components.chat.spending import CostCapReached
from components.corpus.captions.checks import Written, check_chinese, check_english
from components.corpus.captions.spilled import Spilled
from components.corpus.derivatives import Derivative
from components.settings.captions import CaptionSettings
from components.telemetry.progress import track

_ATTEMPTS = 2
"""The second with another seed."""
_IN_FLIGHT_PER_THREAD = 2

Check = Callable[[str], str]


class CaptioningStopped(RuntimeError):
    """Nothing more can be asked; one line says why and how many images are without a result.

    Answers so far are in the cache.
    """


def _write(client: ChatClient, question: Question, check: Check) -> Written:
    """Ask until the text passes its check, at most twice; the last answer is recorded."""
    written = Written(None, "missing")
    for attempt in range(_ATTEMPTS):
        # The attempt is part of what is asked: without it the cache would answer with the text that
        # failed.
        asked = replace(question, attempt=attempt)
        try:
            answer = client.ask(asked)
        except RequestFailed as problem:
            # The client has tried again already; a third time would not help this image.
            return Written(None, "error", str(problem))
        text = clean_answer(answer.text)
        if answer.finish_reason == "refusal":
            status = "refusal"
        elif answer.finish_reason == "length":
            status = "truncated"
        else:
            status = check(text)
        written = Written(text or None, status)
        if status == "ok":
            break
    return written


def _write_all(
    client: ChatClient,
    items: Iterable[tuple[Question, Check]],
    *,
    total: int,
    concurrency: int,
    name: str,
) -> Iterator[tuple[str, Written]]:
    """(image_id, result) in the order of `items`, which are read only as fast as they are used.

    Raises:
        CaptioningStopped: with everything that was in flight finished and stored.
    """
    source = iter(items)
    pending: deque[tuple[str, Future[Written]]] = deque()
    done = 0
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix=name)
    try:
        while True:
            # A few ahead and not all: each question holds a picture, and a million are to be asked.
            while len(pending) < concurrency * _IN_FLIGHT_PER_THREAD:
                following = next(source, None)
                if following is None:
                    break
                question, check = following
                future = pool.submit(_write, client, question, check)
                pending.append((question.image_id, future))
            if not pending:
                return
            image_id, future = pending.popleft()
            written = future.result()
            done += 1
            yield image_id, written
    except (CostCapReached, EndpointUnusable) as problem:
        # Nothing more is sent; requests under way are paid for and stored answers are at hand.
        client.stop.set()
        pool.shutdown()
        done += sum(other.exception() is None for _, other in pending)
        raise CaptioningStopped(
            f"{problem}; {total - done} of {total} images are left to {name}, what is done is "
            "kept: run the stage again"
        ) from None
    finally:
        client.stop.set()
        pool.shutdown(cancel_futures=True)


def caption_images(
    pictures: Iterable[Derivative],
    total: int,
    client: ChatClient,
    prompt: Prompt,
    settings: CaptionSettings,
    *,
    derivative_px: int,
) -> Mapping[str, Written]:
    """English captions by image_id, on disk.

    Args:
        pictures: images to caption, read lazily.
        total: their number.
        client: for `settings.endpoint`.
        prompt: what is asked.
        settings: bounds of the checks.
        derivative_px: long edge of the pictures; another size is another question.

    Raises:
        CaptioningStopped: the cost cap is reached or the endpoint is of no use.
    """
    assert settings.endpoint is not None

    def check(text: str) -> str:
        return check_english(text, settings)[0]

    items = (
        (
            Question(
                picture.image_id, prompt, jpeg=picture.jpeg, picture=f"derivative {derivative_px}"
            ),
            check,
        )
        for picture in pictures
    )
    concurrency = settings.endpoint.concurrency
    results = _write_all(client, items, total=total, concurrency=concurrency, name="caption")
    return _spilled(track(results, "caption", total=total))


def translate_captions(
    captions: Iterable[tuple[str, str]],
    total: int,
    client: ChatClient,
    prompt: Prompt,
    concurrency: int,
) -> Mapping[str, Written]:
    """Chinese captions by image_id, on disk.

    Args:
        captions: image_id and usable English caption, in the order of the corpus; read lazily.
        total: their number.
        client: for the translation endpoint.
        prompt: what is asked.
        concurrency: threads.

    Raises:
        CaptioningStopped: see `caption_images`.
    """

    def check_against(english: str) -> Check:
        return lambda chinese: check_chinese(chinese, english)

    items = (
        (Question(image_id, prompt, text=english), check_against(english))
        for image_id, english in captions
    )
    results = _write_all(client, items, total=total, concurrency=concurrency, name="translate")
    return _spilled(track(results, "translate", total=total))


def _spilled(results: Iterable[tuple[str, Written]]) -> Spilled[Written]:
    written = Spilled(Written)
    for image_id, one in results:
        written.add(image_id, one)
    return written
