from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from components.corpus.manifest import write_table
from components.corpus.selection.attribution import (
    counted_licenses,
    read_attribution_file,
    write_attribution,
)
from components.corpus.selection.rights import (
    Exclusion,
    Exclusions,
    add_exclusions,
    exclusion,
    is_refused,
    is_share_alike,
    kept_apart,
    license_id,
    license_url,
    parse_exclusions,
    read_exclusions,
    refused_licenses,
)
from components.settings.corpus import LicenseSettings

ALL = LicenseSettings(allow=None, deny=(), share_alike="mixed")


# Names: SPDX's list, and the titles and addresses that creativecommons.org gives these licences.
@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("CC-BY-SA-4.0", "CC-BY-SA-4.0"),
        ("cc by-sa 3.0", "CC-BY-SA-3.0"),
        ("CC BY 4.0", "CC-BY-4.0"),
        ("cc-by-nc-nd-4.0", "CC-BY-NC-ND-4.0"),
        ("https://creativecommons.org/licenses/by-nc-sa/2.0/", "CC-BY-NC-SA-2.0"),
        ("http://creativecommons.org/licenses/by/4.0/deed.de", "CC-BY-4.0"),
        ("Attribution-ShareAlike 4.0 International", "CC-BY-SA-4.0"),
        ("Creative Commons Attribution-NonCommercial 2.5", "CC-BY-NC-2.5"),
        ("CC0", "CC0-1.0"),
        ("CC0-1.0", "CC0-1.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("Public Domain", "public-domain"),
        ("https://creativecommons.org/publicdomain/mark/1.0/", "public-domain"),
        ("Unsplash License", "Unsplash License"),
        ("all rights reserved by me", "all rights reserved by me"),
        ("", "unknown"),
        (None, "unknown"),
        (float("nan"), "unknown"),
    ],
)
def test_a_licence_has_one_spelling(said: object, name: str) -> None:
    assert license_id(said) == name
    assert license_id(name) == name


def test_the_address_of_a_licence_is_that_of_its_text() -> None:
    assert license_url("CC-BY-SA-4.0") == "https://creativecommons.org/licenses/by-sa/4.0/"
    assert license_url("CC0-1.0") == "https://creativecommons.org/publicdomain/zero/1.0/"
    assert license_url("Unsplash License") == ""


def test_share_alike_is_what_asks_for_itself() -> None:
    asked = ("CC-BY-SA-4.0", "CC-BY-NC-SA-3.0", "GFDL-1.3", "ODbL-1.0")
    assert all(map(is_share_alike, asked))
    assert not any(map(is_share_alike, ("CC-BY-4.0", "CC0-1.0", "CC-BY-NC-ND-4.0", "unknown")))


def test_denied_wins_over_allowed_and_patterns_know_no_case() -> None:
    rules = LicenseSettings(allow=("cc-by*", "CC0-1.0"), deny=("*-NC*",), share_alike="mixed")
    taken = {n: not is_refused(n, rules) for n in ("CC-BY-4.0", "CC0-1.0", "CC-BY-NC-4.0", "x")}
    assert taken == {"CC-BY-4.0": True, "CC0-1.0": True, "CC-BY-NC-4.0": False, "x": False}


def test_an_unknown_licence_can_be_denied() -> None:
    table = pd.DataFrame({"license": [None, "CC BY 4.0"]})
    rules = LicenseSettings(allow=None, deny=("unknown",), share_alike="mixed")
    refused = refused_licenses(table, rules)
    assert refused is not None
    assert refused.tolist() == [True, False]
    assert refused_licenses(table, ALL) is None


def test_one_denied_copy_is_enough_and_one_known_licence_of_a_copy_is_known() -> None:
    others = [[{"license": "CC BY-NC-ND 4.0"}], [{"license": "CC0"}], [{"photographer": "x"}], None]
    table = pd.DataFrame(
        {
            "license": pd.Categorical(["CC0", None, None, "CC0"]),
            "other_credits": [one and json.dumps(one) for one in others],
        }
    )
    denied = LicenseSettings(allow=None, deny=("*-NC*", "unknown"), share_alike="mixed")
    allowed = LicenseSettings(allow=("CC0-1.0",), deny=(), share_alike="mixed")
    for rules in (denied, allowed):
        refused = refused_licenses(table, rules)
        assert refused is not None
        assert refused.tolist() == [True, False, True, False]


def test_an_entry_means_a_photograph_by_what_its_copies_are_credited_with(tmp_path: Path) -> None:
    other = [{"photographer": "Jane Forget", "image_url": "https://x.org/j.jpg"}]
    rows = ROWS.assign(other_credits=[None, json.dumps(other), *[None] * (len(ROWS) - 2)])
    path = tmp_path / "manifest.parquet"
    write_table(rows, path)
    for kind, value in (("photographer", "jane forget"), ("url", "x.org/j.jpg"), ("host", "x.org")):
        listed = Exclusions([exclusion(kind, value, "", "here")])
        assert np.flatnonzero(listed.mask(rows)).tolist() == [1]
        # What `corpus forget` asks: nobody's photograph may be told to have gone into nothing.
        assert listed.images_by_entry(path) == [listed.images(path)] == [{"b" * 64}]


def test_share_alike_stands_apart_from_both_sides() -> None:
    table = pd.DataFrame({"license": ["CC-BY-SA-4.0", "CC0", None]})

    def out(mode: str) -> list[bool] | None:
        mask = kept_apart(table, ALL.model_copy(update={"share_alike": mode}))
        return None if mask is None else mask.tolist()

    assert out("mixed") is None
    assert out("without") == [True, False, False]
    assert out("only") == [False, True, True]


ROWS = pd.DataFrame(
    {
        "image_id": ["a" * 64, "b" * 64, "c" * 64, "d" * 64, "b" * 64, "e" * 64],
        "uri": ["x/1.jpg", "x/2.jpg", "x/3.jpg", "x/4.jpg", "x/5.jpg", "x/6.jpg"],
        "photographer": [
            "Ann  Lee (Unsplash)",
            "Bo Ek",
            None,
            "Ann Leeson",
            "Someone Else",
            "Zoe\N{COMBINING DIAERESIS} Ek",
        ],
        "image_url": [
            "https://img.example.org/1.jpg",
            None,
            "http://www.other.net/3.jpg?w=1",
            "https://badexample.org/4.jpg",
            None,
            None,
        ],
        "work_url": [None, "https://site.org/works/2/", None, None, None, None],
    }
)


@pytest.mark.parametrize(
    ("kind", "value", "meant"),
    [
        ("photographer", "ann lee", [0]),
        ("photographer", "Ann Lee (Unsplash)", [0]),
        ("photographer", "Ann Lee (Flickr)", []),
        # One letter, or a letter and its accent; wide letters of a Japanese keyboard.
        ("photographer", "Zo\N{LATIN SMALL LETTER E WITH DIAERESIS} Ek", [5]),
        ("photographer", "\N{FULLWIDTH LATIN CAPITAL LETTER B}o Ek", [1]),
        ("identity", "B" * 64, [1, 4]),
        ("identity", "x/3.jpg", [2]),
        ("url", "http://other.net/3.jpg?w=1", [2]),
        ("url", "https://other.net/3.jpg", []),
        ("url", "site.org/works/2", [1]),
        ("host", "example.org", [0]),
        ("host", "https://WWW.example.org/anything", [0]),
        ("host", "img.example.org", [0]),
    ],
)
def test_an_entry_means_these_rows(kind: str, value: str, meant: list[int]) -> None:
    mask = Exclusions([exclusion(kind, value, "", "here")]).mask(ROWS)
    assert np.flatnonzero(mask).tolist() == meant


def test_equal_bytes_are_excluded_whoever_is_credited(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_table(ROWS, path)
    listed = Exclusions([Exclusion("photographer", "Bo Ek")])
    assert listed.images(path) == {"b" * 64}
    column = listed.column(path)
    assert column is not None
    assert column.tolist() == [False, True, False, False, True, False]
    assert Exclusions([Exclusion("photographer", "Nobody")]).column(path) is None


def test_a_list_comes_back_without_entries_that_stand_twice(tmp_path: Path) -> None:
    path = tmp_path / "exclusions.csv"
    path.write_text("kind,value,why\n")
    entries = [
        Exclusion("photographer", "Lee, Ann", "asked on 2026-11-01"),
        Exclusion("photographer", "LEE,  ann"),
        Exclusion("host", "example.org"),
    ]
    add_exclusions(path, entries)
    assert read_exclusions(path) == [entries[0], entries[2]]


def test_what_people_wrote_in_a_list_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "exclusions.csv"
    mine = '\ufeffTicket,Kind,value,why,asked_by\r\n"7",host,a.org,"x, y",Bo\r\n8,host,A.org,,'
    path.write_bytes(mine.encode())
    add_exclusions(path, [Exclusion("host", "a.org"), Exclusion("photographer", "Ann, L", "asked")])
    added = '\r\n,photographer,"Ann, L",asked,\r\n'
    assert path.read_bytes().decode() == mine + added
    assert read_exclusions(path)[-1] == Exclusion("photographer", "Ann, L", "asked")


def test_each_entry_has_its_own_photographs(tmp_path: Path) -> None:
    write_table(ROWS, tmp_path / "manifest.parquet")
    pairs = [("photographer", "ann lee"), ("host", "nowhere.example"), ("host", "example.org")]
    pairs += [("identity", "B" * 64), ("url", "site.org/works/2")]
    listed = Exclusions([exclusion(kind, value, "", "here") for kind, value in pairs])
    found = listed.images_by_entry(tmp_path / "manifest.parquet")
    assert [sorted(one[0] for one in ids) for ids in found] == [["a"], [], ["a"], ["b"], ["b"]]
    assert set().union(*found) == listed.images(tmp_path / "manifest.parquet")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind,value\nperson,X\n", "list line 2: kind 'person'; choose identity, url"),
        ("kind,value\nphotographer,  \n", "list line 2: photographer has no value"),
        ("kind,value\nhost,https://\n", "list line 2: host has no value"),
        ("kind,value,why\nphotographer,Lee, Ann,asked\n", "list line 2: 4 cells for 3 columns"),
        ("kind,value,Value\nhost,a.org,b.org\n", "list: two columns are named value"),
        ("who\nX\n", "list: no column kind; the columns are kind, value, why"),
    ],
)
def test_an_entry_that_means_nobody_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="^" + said):
        parse_exclusions(text, "list")


def test_attribution_names_author_licence_source_and_changes(tmp_path: Path) -> None:
    table = ROWS.assign(license=["CC-BY-SA-4.0", None, "CC0", "CC0 1.0", None, None])
    write_table(table, tmp_path / "manifest.parquet")
    write_attribution(tmp_path / "manifest.parquet", {"stage1": np.array([0, 2, 3])}, tmp_path)
    rows = read_attribution_file(tmp_path / "stage1.csv")
    assert [row["image_id"][0] for row in rows] == ["a", "c", "d"]
    assert rows[0]["photographer"] == "Ann  Lee (Unsplash)"
    assert rows[0]["license_url"] == "https://creativecommons.org/licenses/by-sa/4.0/"
    assert [row["share_alike"] for row in rows] == ["yes", "no", "no"]
    assert "cropped" in rows[0]["changes"]
    assert rows[1]["photographer"] == ""
    assert [(name, n) for name, _, n in counted_licenses(rows)] == [
        ("CC0-1.0", 2),
        ("CC-BY-SA-4.0", 1),
    ]
