"""Which relay, and what it takes to use it.

A relay's URL has one spelling, so that two records that mean the same relay say the same. The token is the user's own
secret: it goes to the relay it belongs to and nowhere else, and is in no record, log or `repr`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from urllib.parse import SplitResult, urlsplit

from tessera.core.errors import Invalid

__all__ = ["DEFAULT_PORT", "TOKEN_LIMIT", "RelayUrl", "canonical_url", "check_token"]

DEFAULT_PORT = 3340
TOKEN_LIMIT = 256  # characters
URL_LIMIT = 200  # characters; `relay:` and this fit into one address of a record
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_TOKEN = re.compile(r"[\x21-\x7e]+")  # it travels in an HTTP header


@dataclass(frozen=True, slots=True)
class RelayUrl:
    """A relay that its user chose: `http://host:port` or `https://host:port`, and a token where it asks for one.

    Raises: Invalid for anything else.

    >>> RelayUrl("HTTP://Relay.Example:3340/").url
    'http://relay.example:3340'
    """

    url: str
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", canonical_url(self.url))
        if self.token:
            check_token(self.token)

    @property
    def host(self) -> str:
        """A name or an IP address, without brackets."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        parts = urlsplit(self.url)
        return parts.port or _PORTS[parts.scheme]

    @property
    def encrypted(self) -> bool:
        """Whether the way to the relay is under TLS, which hides the token and who talks with whom from the wire."""
        return self.url.startswith("https:")


def canonical_url(text: object) -> str:
    """The one spelling of a relay's URL: lower case, no path, no port where it is the scheme's own.

    Raises: Invalid.
    """
    if not isinstance(text, str) or len(text) > URL_LIMIT or not text.isascii():
        raise Invalid(f"a relay's URL has up to {URL_LIMIT} ASCII characters, not {str(text)[:80]!r}")
    try:
        parts = urlsplit(text)
        port, host = parts.port, _host(parts)
    except ValueError as error:
        raise _not_a_relay(text, str(error)) from error
    if parts.scheme not in _PORTS or not host or port == 0:
        raise _not_a_relay(text, "no scheme, host or port that makes sense")
    if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise _not_a_relay(text, "it has no path, query or user name; a token is given beside it")
    return f"{parts.scheme}://{host}" + (f":{port}" if port and port != _PORTS[parts.scheme] else "")


def check_token(token: str) -> str:
    """Raises `Invalid` for what cannot travel in a header; the message does not repeat the token."""
    if not 8 <= len(token) <= TOKEN_LIMIT or _TOKEN.fullmatch(token) is None:
        raise Invalid(f"a relay's token is 8 to {TOKEN_LIMIT} visible ASCII characters without spaces")
    return token


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").lower()
    if ":" in host:
        return f"[{IPv6Address(host)}]"
    return host if _HOST.fullmatch(host) else ""


def _not_a_relay(text: str, reason: str) -> Invalid:
    return Invalid(f"{text[:80]!r} is no relay's URL ({reason}); one looks like http://203.0.113.7:{DEFAULT_PORT}")
