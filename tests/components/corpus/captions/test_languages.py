"""Languages are identified where they can be, and what cannot be told is let through."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from components.corpus.captions.languages import (
    CHINESE,
    ENGLISH,
    is_surely_not,
    is_traditional,
    language_probabilities,
    one_sided_characters,
    script_share,
)

ROOT = Path(__file__).parents[4]
FOREIGN = {
    "fr": "Deux enfants marchent main dans la main sous un ciel d'automne chargé de nuages gris.",
    "de": "Zwei Kinder gehen Hand in Hand auf einem von Pappeln gesäumten Weg im grauen Herbst.",
    "es": "Dos niños caminan de la mano por un camino bordeado de álamos bajo un cielo gris.",
    "it": "Due bambini camminano mano nella mano su un sentiero sotto un cielo grigio d'autunno.",
    "pt": "Duas crianças caminham de mãos dadas por um caminho sob um céu cinzento de outono.",
    "nl": "Twee kinderen lopen hand in hand over een pad met populieren onder een grijze lucht.",
    "sv": "Två barn går hand i hand på en stig kantad av popplar under en grå hösthimmel.",
    "da": "To børn går hånd i hånd på en sti omgivet af popler under en grå efterårshimmel.",
    "pl": "Dwoje dzieci idzie ręka w rękę drogą wysadzaną topolami pod szarym jesiennym niebem.",
    "tr": "İki çocuk gri bir sonbahar göğünün altında kavaklarla çevrili yolda el ele yürüyor.",
    "id": "Dua anak berjalan bergandengan tangan di jalan di bawah langit musim gugur kelabu.",
    "vi": "Hai đứa trẻ nắm tay nhau đi trên con đường có hàng cây dưới bầu trời mùa thu.",
    "fi": "Kaksi lasta kävelee käsi kädessä poppelien reunustamaa polkua syystaivaan alla.",
    "hu": "Két gyerek kézen fogva sétál egy nyárfákkal szegélyezett úton a szürke őszi ég alatt.",
}
UNUSUAL_ENGLISH = [
    "a red boat on a lake",
    "a photo of sks dog",
    "1girl, solo, long hair, blue eyes, school uniform, outdoors, cherry blossoms",
    "Vineyards near Saint-Émilion, Bordeaux, Nouvelle-Aquitaine",
    "Low tide at Playa de las Catedrales, Galicia, Spain",
    "La Sagrada Familia by Antoni Gaudi in Barcelona seen from Placa de Gaudi",
    "A Volkswagen Beetle parked on Kurfürstendamm, Berlin",
    "a samurai (katana) standing in a field of susuki grass, ukiyo-e",
    "El Capitan, Yosemite Valley",
    "A tuxedo cat",
    "boat",
    "IMG 0001",
]


@pytest.mark.parametrize("language", FOREIGN)
def test_latin_letters_do_not_make_a_text_english(language: str) -> None:
    words = FOREIGN[language].split()
    # Whole, and any six words of it.
    pieces = [" ".join(words[start : start + 6]) for start in range(len(words) - 5)]
    for text in (FOREIGN[language], *pieces):
        assert is_surely_not(text, ENGLISH), text
        assert script_share(text, "LATIN") == 1.0
    assert not is_surely_not(FOREIGN[language], [language])


@pytest.mark.parametrize("text", UNUSUAL_ENGLISH)
def test_names_tags_and_what_is_too_short_to_tell_stay(text: str) -> None:
    assert not is_surely_not(text, ENGLISH)


def test_pieces_of_the_shipped_captions_are_english_and_chinese() -> None:
    lines = (ROOT / "data" / "sample" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rng = random.Random(0)
    for row in map(json.loads, lines):
        words = row["caption_en"].split()
        start = rng.randrange(len(words) - 4)
        for text in (row["caption_en"], " ".join(words[start : start + 4])):
            assert not is_surely_not(text, ENGLISH), text
        start = rng.randrange(len(row["caption_zh"]) - 12)
        for text in (row["caption_zh"], row["caption_zh"][start : start + 12]):
            assert not is_surely_not(text, CHINESE), text
            assert not is_traditional(text), text


def test_probabilities_sum_to_one_and_stand_in_order() -> None:
    found = language_probabilities(FOREIGN["fr"])
    assert next(iter(found)) == "fr"
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_japanese_and_korean_are_not_chinese() -> None:
    assert is_surely_not("夕日に照らされた静かな湖と赤い山の風景です", CHINESE)
    assert is_surely_not("붉은 언덕 아래 고요한 호수가 펼쳐져 있다", CHINESE)


@pytest.mark.parametrize(
    ("simplified", "traditional"),
    [
        ("湖上有一艘红色的小船", "湖上有一艘紅色的小船"),
        ("两个孩子在林间小路上散步", "兩個孩子在林間小路上散步"),
        ("夕阳下的海滩", "夕陽下的海灘"),
        ("老渔夫的肖像", "老漁夫的肖像"),
        ("春天的樱花", "春天的櫻花"),
        ("房间里的丝绸窗帘", "房間裡的絲綢窗簾"),
        ("瓷砖墙边摆着面包", "瓷磚牆邊擺著麵包"),
    ],
)
def test_traditional_chinese_is_told_by_its_characters(simplified: str, traditional: str) -> None:
    assert not is_traditional(simplified)
    assert is_traditional(traditional)


def test_a_quoted_sign_does_not_make_a_caption_traditional() -> None:
    assert not is_traditional("招牌上写着「龍鳳酒樓」，霓虹灯倒映在湿漉漉的街道上")


def test_characters_that_both_standards_hold_say_nothing() -> None:
    simplified, traditional = one_sided_characters()
    assert not simplified & traditional
    # In both, or forms that live on in simplified names: the year of 乾隆, 著名, 狼藉.
    shared = "一山水木雪林城夜景的在乾著藉后里面"
    assert not set(shared) & (simplified | traditional)
    assert set("龙门马鸟见车长东书") <= simplified
    assert set("龍門馬鳥見車長東書裏為") <= traditional
    assert not is_traditional("一山水木")
