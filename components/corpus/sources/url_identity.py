"""One spelling per web address, so that the same photograph is not fetched twice (RFC 3986, 6.2).

Only spellings that every server must treat alike are merged: the order and content of the query
stay, since servers differ there.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote_to_bytes, urlsplit, urlunsplit

MAX_URL_CHARACTERS = 4096
_DEFAULT_PORTS = {"http": 80, "https": 443}
_UNRESERVED = "-._~"
_PATH_SAFE = "!$&'()*+,;=:@/"
_QUERY_SAFE = "!$&'()*+,;=:@/?"
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")


def _escaped(text: str, safe: str) -> str:
    """Percent-encode what must be, decode what need not be, upper-case the digits of the rest."""

    def again(match: re.Match[str]) -> str:
        byte = unquote_to_bytes(match.group())
        character = byte.decode("latin-1")
        # Only unreserved characters mean the same with and without their escape; "%2F" is not "/".
        plain = character.isascii() and (character.isalnum() or character in _UNRESERVED)
        return character if plain else match.group().upper()

    # A percent sign that begins no escape means itself.
    text = _STRAY_PERCENT.sub("%25", text)
    return _ESCAPE.sub(again, quote(text, safe=f"{safe}%{_UNRESERVED}"))


def _without_dots(path: str) -> str:
    """Resolve "." and ".." segments (RFC 3986, 5.2.4); ".." above the root is dropped."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for place, segment in enumerate(segments):
        last = place == len(segments) - 1
        if segment == "..":
            if kept:
                kept.pop()
            if last:
                kept.append("")
        elif segment == ".":
            if last:
                kept.append("")
        else:
            kept.append(segment)
    return "/" + "/".join(kept)


def _host(name: str) -> str:
    """Lower case ASCII host; international names in their wire form (IDNA).

    Raises:
        ValueError: not a host name or address.
    """
    # Only IPv6 addresses have colons once the port is off.
    if ":" in name:
        return f"[{name.lower()}]"
    try:
        ascii_name = name.encode("ascii" if name.isascii() else "idna").decode("ascii").lower()
    except UnicodeError:
        raise ValueError("host is not a valid name") from None
    if not _HOST.fullmatch(ascii_name):
        raise ValueError("host is not a valid name")
    return ascii_name


def normalise_url(text: str) -> str:
    """The one spelling of an http(s) URL; idempotent.

    Scheme and host in lower case, default port and fragment dropped, dot segments resolved,
    escapes in upper case and only where needed.

    Raises:
        ValueError: no http(s) URL, without host, with a user name, or too long; says which.
    """
    stripped = text.strip()
    if len(stripped) > MAX_URL_CHARACTERS:
        raise ValueError(f"longer than {MAX_URL_CHARACTERS} characters")
    # `urlsplit` removes tabs and line ends in silence: two records would become one other address.
    if any(ord(character) < 32 or ord(character) == 127 for character in stripped):
        raise ValueError("control characters inside")
    try:
        parts = urlsplit(stripped)
        name, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("not a URL") from None
    if parts.scheme.lower() not in _DEFAULT_PORTS:
        raise ValueError("scheme is not http or https")
    if not name:
        raise ValueError("no host")
    # Credentials of somebody would end in a table and in requests.
    if "@" in parts.netloc:
        raise ValueError("user name in the address")
    scheme = parts.scheme.lower()
    host = _host(name)
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{port}"
    try:
        path = _without_dots(_escaped(parts.path, _PATH_SAFE)) if parts.path else "/"
        query = _escaped(parts.query, _QUERY_SAFE)
    except UnicodeEncodeError:
        raise ValueError("characters that cannot be encoded") from None
    return urlunsplit((scheme, host, path, query, ""))


def host_of(url: str) -> str:
    """Host with port of a normalised URL: the unit of rate limits."""
    return urlsplit(url).netloc
