"""Refusals, markup, loops and cut sentences are told from captions that only look like them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.corpus.captions.flaws import (
    has_markup,
    is_cut_chinese,
    is_cut_english,
    is_refusal,
    is_repetitive,
    is_undecoded,
    is_unreadable,
)
from components.corpus.captions.statuses import STATUSES, remedies

ROOT = Path(__file__).parents[4]
WHOLE = (
    "A wide plain under deep snow runs to the horizon. A wooden fence crosses the frame and a "
    "village leans against a hill."
)


@pytest.mark.parametrize(
    "text",
    [
        "I’m sorry, but I can’t help with that.",
        "I apologize, but I cannot describe this image.",
        "Sure! However, I am unable to view the image you mention.",
        "Unfortunately, I do not have the ability to see pictures.",
        "As an AI language model, I can see a lake.",
        "It seems that no image was attached to your message.",
        "Please provide the image that you would like me to describe.",
        "The image cannot be displayed.",
        "This request violates our content policy.",
        "Unable to process the picture.",
        "很抱歉，我无法查看图片。",
        "作为一个人工智能，我……",
        "您好，我目前无法直接查看图片内容。",
        "请上传您想让我描述的图片。",
    ],
)
def test_a_model_that_declines_is_heard(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "A sign on the wall reads 'I can't stop dancing' above a crowded floor.",
        "A sorry-looking scarecrow stands in a field.",
        "As an aircraft climbs, its wings glow in the evening light.",
        "Two people share a picture of their village, attached to the wall with tape.",
        "作为画面中心的湖十分平静。",
        "远处的山峰被浓雾遮挡，无法看到山顶。",
        "",
    ],
)
def test_what_only_sounds_like_a_refusal_is_none(text: str) -> None:
    assert not is_refusal(text)


def test_a_refusal_far_into_a_text_is_part_of_a_caption() -> None:
    assert not is_refusal("word " * 100 + "I cannot describe it")


@pytest.mark.parametrize(
    "text",
    [
        "<p>A lake</p>",
        "A lake<br/>below hills",
        'A <a href="x">lake</a>',
        "Salt &amp; pepper",
        "A lake &#39;at dawn&#39;",
        "**Subject:** a lake",
        "# Caption\nA lake",
        "- a lake\n- a hill",
        "![lake](lake.png)",
        "```A lake```",
        '{"caption": "a lake"}',
        "A lake<|im_end|>",
        "A lake</s>",
        "<image> A lake",
        "[INST] describe [/INST]",
        "Photo from https://example.com/lake",
        "www.example.com a lake",
        "ASSISTANT: A lake",
        "[b]A lake[/b]",
    ],
)
def test_markup_is_found(text: str) -> None:
    assert has_markup(text)


@pytest.mark.parametrize(
    "text",
    [
        "a photo of <sks> dog",
        "a < b and c > d on a blackboard",
        "R&D; a laboratory at night",
        "5 * 3 * 2 on a blackboard",
        "mountain, lake (masterpiece:1.2), [fog]",
        "a sign that says #1 bakery",
        "a well-lit room - the kitchen",
    ],
)
def test_angle_brackets_and_hashes_alone_are_no_markup(text: str) -> None:
    assert not has_markup(text)


@pytest.mark.parametrize(
    "text",
    [
        WHOLE[:-1],
        WHOLE[:-6],
        "A lake below red hills and",
        "A lake below the",
        "A lake below red hills,",
        "A lake below red hills...",
        "A lake below red hills…",
        "A lake (",
        "A lake below red h",
        " ".join(["A", *(f"word{n}" for n in range(39))]),
    ],
)
def test_a_cut_sentence_is_found(text: str) -> None:
    assert is_cut_english(text)


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        "A lake below red hills",
        "A chair to sit on",
        "Platform A",
        "lake",
        "",
        "The sign says “A calm lake.”",
        "St. Paul's and the U.S. Capitol seen from Mt. Vernon in ca. 1900 by many people who came "
        "here early on that day in June",
        "Sunset over the bay. Photo by Jane Doe",
        ", ".join(f"Tag{n} tall" for n in range(40)),
        " ".join(f"word{n}" for n in range(39)),
        "Which way does the river run?",
    ],
)
def test_titles_tags_and_whole_sentences_are_not_cut(text: str) -> None:
    assert not is_cut_english(text)


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [
        ("红色山丘下平静的湖", False),
        ("红色山丘下平静的湖，", True),
        ("红色山丘下平静的湖……", True),
        ("红色山丘下平静的湖。" * 2, False),
        ("红色山丘下有一片平静的湖水，岸边停着小船。远处的村庄被薄雾笼罩，屋顶", True),
        ("红色山丘下有一片平静的湖水，岸边停着小船。远处的村庄写着“欢迎回家。”", False),
        ("湖。山", False),
        ("", False),
    ],
)
def test_chinese_sentences_end_with_their_own_marks(text: str, is_cut: bool) -> None:
    assert is_cut_chinese(text) is is_cut


@pytest.mark.parametrize("words", [10, 40, 200])
def test_a_loop_is_found_at_any_length_and_a_refrain_is_none(words: int) -> None:
    loop = ["the", "lake", "lies", "below", "the", "red", "hills", "and"]
    assert is_repetitive((loop * words)[: words * 8], 5)
    rng = random.Random(words)
    text = [chr(97 + rng.randrange(26)) * rng.randrange(1, 9) for _ in range(words)]
    assert not is_repetitive(text, 5)
    refrain = ["a", "lake", "below", "red", "hills"]
    assert not is_repetitive([*text, *refrain, *text[::-1], *refrain], 5)


def test_a_sentence_said_three_times_is_a_loop() -> None:
    sentence = [f"word{n}" for n in range(34)]
    assert is_repetitive(sentence * 3, 5)
    assert not is_repetitive(sentence, 5)


@given(st.text())
def test_any_text_can_be_asked(text: str) -> None:
    for question in (is_refusal, has_markup, is_cut_english, is_cut_chinese, is_unreadable):
        assert question(text) in (True, False)


def test_unreadable_characters_are_found() -> None:
    assert is_unreadable("caf\ufffd")
    assert is_unreadable("caf\udce9")
    assert not is_unreadable("café 湖 😀\ta\r\nb")
    for control in "\0\x07\x1f\x7f\x92":
        assert is_unreadable(f"a lake{control} in snow")
        # A file may be called so.
        assert not is_undecoded(control)
    assert is_undecoded("\udce9")


def test_remedies_name_the_commonest_first_and_fit_the_status() -> None:
    found = remedies({"ok": 9, "too_short": 1, "repetitive": 3, "missing": 0})
    assert found.startswith("repetitive (3): remove what is repeated")
    assert "too_short (1): " in found
    assert "missing" not in found
    assert "min_words" not in remedies({"repetitive": 3})


def test_the_documentation_lists_every_status() -> None:
    text = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")
    assert [name for name in STATUSES if f"| `{name}` |" not in text] == []
