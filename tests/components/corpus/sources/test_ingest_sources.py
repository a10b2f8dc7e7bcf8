"""Identity of addresses; the probe; the alias table."""

from __future__ import annotations

import io
import json
import math
import string
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.corpus.sources.image_probe import PROBE_BYTES, image_extension, image_size
from components.corpus.sources.originals import OriginalWriter, keep_originals, prune_originals
from components.corpus.sources.public_addresses import is_public
from components.corpus.sources.record_fields import ALIASES, extra_json, read_fields
from components.corpus.sources.url_identity import host_of, normalise_url

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HTTP://Example.COM:80", "http://example.com/"),
        ("https://example.com:443/a/./b/../c.jpg#part", "https://example.com/a/c.jpg"),
        ("https://example.com:8443/%7euser/%2f%c3%a9", "https://example.com:8443/~user/%2F%C3%A9"),
        ("  https://example.com/a b.jpg?x=é&y=1 ", "https://example.com/a%20b.jpg?x=%C3%A9&y=1"),
        ("https://bücher.example/100%", "https://xn--bcher-kva.example/100%25"),
        ("http://[2001:DB8::1]:80/x", "http://[2001:db8::1]/x"),
        ("http://example.com/../../x", "http://example.com/x"),
    ],
)
def test_equal_addresses_get_one_spelling(text: str, expected: str) -> None:
    assert normalise_url(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "photo.jpg",
        "ftp://example.com/x",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "http://",
        "http://user:secret@example.com/",
        "http://example.com:99999/",
        "http://exa mple.com/",
        "http://[::1",
        "http://example.com/a\nb",
        "http://example.com/\ud800",
        "http://example.com/" + "a" * 5000,
        "http://a..b/",
    ],
)
def test_what_is_no_web_address_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        normalise_url(text)
    assert "secret" not in str(caught.value)


_PATHS = st.text(st.characters(codec="utf-8", exclude_characters="#?\\"), max_size=40)


@given(
    st.sampled_from(["http", "HTTPS"]),
    st.text(string.ascii_letters + string.digits, min_size=1, max_size=20),
    _PATHS,
    st.text(st.characters(codec="utf-8", exclude_characters="#"), max_size=20),
)
def test_normalising_twice_is_normalising_once(
    scheme: str, host: str, path: str, query: str
) -> None:
    text = f"{scheme}://{host}.example/{path}?{query}"
    try:
        once = normalise_url(text)
    except ValueError:
        return
    assert normalise_url(once) == once
    assert once.isascii()
    assert host_of(once) == f"{host}.example".lower()
    assert not {".", ".."} & set(urlsplit(once).path.split("/"))
    assert normalise_url(f"{once}#fragment") == once


@given(st.text(max_size=60))
def test_any_text_is_normalised_or_refused(text: str) -> None:
    try:
        url = normalise_url(text)
    except ValueError:
        return
    assert url.startswith(("http://", "https://"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("172.31.255.255", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:0a00:0001::1", False),
        ("2001:0:4136:e378:8000:63bf:a247:27dd", True),
        ("2001:0:4136:e378:8000:63bf:f5ff:fffe", False),
        ("example.com", False),
        ("", False),
    ],
)
def test_only_what_the_whole_internet_shares_is_public(address: str, expected: bool) -> None:
    assert is_public(address) is expected


@pytest.mark.parametrize(
    ("kind", "extension"),
    [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif"), ("AVIF", ".avif")],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_kind_and_size_come_from_the_first_bytes(kind: str, extension: str, mode: str) -> None:
    if (kind, mode) == ("JPEG", "RGBA"):
        mode = "L"
    file = io.BytesIO()
    Image.new(mode, (317, 211)).save(file, kind)
    prefix = file.getvalue()[:PROBE_BYTES]
    assert image_extension(prefix) == extension
    assert image_size(prefix) == (211, 317)


def test_lossless_webp_and_truncated_headers() -> None:
    file = io.BytesIO()
    Image.new("RGB", (31, 17)).save(file, "WEBP", lossless=True)
    assert image_size(file.getvalue()[:30]) == (17, 31)
    assert image_size(file.getvalue()[:20]) is None


@given(
    st.binary(max_size=80), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0"])
)
def test_any_bytes_are_probed_without_an_error(data: bytes, magic: bytes) -> None:
    size = image_size(magic + data)
    assert size is None or len(size) == 2


def test_aliases_are_found_in_any_spelling_and_the_rest_is_kept() -> None:
    fields = read_fields(
        {
            "Image-URL": "http://a/1.jpg",
            "EN Caption": " a lake ",
            "author": math.nan,
            "artist": "Ada",
            "id": 17,
            "license": ["CC0"],
            "exif": {"iso": 100, "bad": math.inf},
            "tags": ["x", None],
        }
    )
    assert fields.known == {
        "image_url": "http://a/1.jpg",
        "caption_en": "a lake",
        "photographer": "Ada",
        "record_id": "17",
    }
    assert fields.wrong_type == ("license",)
    assert fields.extra == {
        "license": ["CC0"],
        "exif": {"iso": 100, "bad": "inf"},
        "tags": ["x", None],
    }


def test_no_alias_means_two_things() -> None:
    names = [alias for aliases in ALIASES.values() for alias in aliases]
    assert len(names) == len(set(names))


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
_KEYS = st.sampled_from(sorted({a for names in ALIASES.values() for a in names})) | st.text(
    max_size=6
)


@given(st.dictionaries(_KEYS, _JSON, max_size=8))
def test_any_record_is_sorted_into_storable_columns(record: dict[str, Any]) -> None:
    fields = read_fields(record)
    for name, value in fields.known.items():
        assert name in ALIASES
        assert value.encode("utf-8").strip()
    json.loads(extra_json(fields.extra).encode("utf-8"))
    # Every key is used, kept aside, or empty.
    known_keys = {a for names in ALIASES.values() for a in names}
    for key, value in record.items():
        if (
            key not in known_keys
            and "\ufffd" not in key
            and not any("\ud800" <= c <= "\udfff" for c in key)
        ):
            normal = key.strip().lower().replace("-", "_").replace(" ", "_")
            assert key in fields.extra or normal in known_keys, (key, value)


def test_pruning_keeps_what_rows_name_and_removes_what_a_kill_left(tmp_path: Path) -> None:
    writer = OriginalWriter(tmp_path)
    writer.write(bytes(70_000))
    with OriginalWriter(tmp_path) as other:
        other.write(b"whole")
        name = f"{other.seal('.jpg')}.jpg"
    with OriginalWriter(tmp_path) as third:
        third.write(b"old")
        third.seal(".jpg")
    keep_originals([other, third])
    assert prune_originals(tmp_path, {name}) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name]
