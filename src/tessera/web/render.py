"""Snapshots as HTML: the whole page once, then the sections that changed.

Invariants: everything is escaped unless a function here built it from escaped parts; a link is made only from text
that has the form of what it links to; one snapshot is rendered once, however many readers there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tessera.core.hashing import sha256
from tessera.devnet import figures
from tessera.devnet.snapshot import Snapshot
from tessera.web.mosaic import income_bar, ownership_bar, tiles

__all__ = ["ACCOUNT", "PEER", "SECTIONS", "STATIC", "TRANSACTION", "Renderer", "make_environment"]

HERE = Path(__file__).parent
STATIC = HERE / "static"
SECTIONS = (
    "status", "figures", "pipeline", "evaluations", "workers", "owners", "income", "epochs", "payments", "sample",
    "events", "reach",
)  # fmt: skip
PHASES = ("starting", "seating", "training", "serving", "closed")
TRANSACTION = re.compile(r"0x[0-9a-f]{64}")
ACCOUNT = re.compile(r"0x[0-9a-fA-F]{40}")
PEER = re.compile(r"[0-9a-f]{64}")


class Renderer:
    """Fragments of the page. Cheap to ask again for the same snapshot."""

    def __init__(self) -> None:
        self._jinja = make_environment()
        self._last: tuple[Snapshot, Mapping[str, str]] | None = None

    def fragments(self, snapshot: Snapshot) -> Mapping[str, str]:
        """The inner HTML of each section by name."""
        if self._last is None or self._last[0] is not snapshot:
            names = {"s": snapshot}
            made = {name: self._jinja.get_template(f"_{name}.html").render(names) for name in SECTIONS}
            self._last = (snapshot, MappingProxyType(made))
        return self._last[1]

    def page(self, snapshot: Snapshot) -> str:
        sections = {name: Markup(html) for name, html in self.fragments(snapshot).items()}
        return self._jinja.get_template("page.html").render(s=snapshot, sections=sections)

    def detail(self, **names: Any) -> str:
        """A small page: `title`, `lead`, and `groups` of facts."""
        return self._jinja.get_template("detail.html").render(**names)

    def questions(self, **names: Any) -> str:
        """What agents ask: `waiting`."""
        return self._jinja.get_template("questions.html").render(**names)


def make_environment() -> Environment:
    """Templates that escape, with the filters and functions that every page may use."""
    jinja = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    jinja.filters |= {
        "count": figures.count,
        "compact": figures.compact,
        "bytes": figures.bytes_text,
        "loss": figures.loss_text,
        "shares": figures.shares_down,
        "short": figures.short,
        "moment": _moment,
        "tx_link": _tx_link,
        "account_link": _account_link,
        "peer_link": _peer_link,
        "linked": _linked,
    }
    jinja.globals |= {
        "money": figures.money,
        "money_column": figures.money_column,
        "percent": figures.percent_down,
        "headlines": figures.headlines,
        "progress": figures.progress,
        "tiles": tiles,
        "income_bar": income_bar,
        "ownership_bar": ownership_bar,
        "asset": _asset,
        "phases": PHASES,
    }
    return jinja


def _asset(path: str, known: dict[str, str] = {}) -> str:  # noqa: B006 - a cache: files do not change while we run
    """The URL of a static file; it changes with the content, so that browsers may keep it for ever."""
    if path not in known:
        known[path] = f"/static/{path}?v={sha256((STATIC / path).read_bytes()).hex()[:12]}"
    return known[path]


def _moment(seconds: float) -> Markup:
    iso = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    return Markup('<time datetime="{}">{} UTC</time>').format(iso, figures.clock_text(seconds))


def _link(form: re.Pattern[str], path: str, text: str, focus: str, shown: str | None) -> Markup:
    """`focus` is an id that stays, so that the keyboard's place survives an update."""
    label = shown if shown is not None else figures.short(text)
    if form.fullmatch(text) is None:
        return Markup('<span class="id">{}</span>').format(label or figures.ABSENT)
    identity = Markup(' id="{}"').format(focus) if focus else ""
    return Markup('<a class="id" href="{}{}" title="{}"{}>{}</a>').format(path, text, text, identity, label)


def _tx_link(text: str, focus: str = "", shown: str | None = None) -> Markup:
    return _link(TRANSACTION, "/tx/", text, focus, shown)


def _account_link(text: str, focus: str = "", shown: str | None = None) -> Markup:
    return _link(ACCOUNT, "/account/", text, focus, shown)


def _peer_link(text: str, focus: str = "", shown: str | None = None) -> Markup:
    return _link(PEER, "/peer/", text, focus, shown)


def _linked(value: object, name: str = "") -> Markup:
    """A value of a fact: addresses link to their account; transactions do where the fact's name says so."""
    if value is None or isinstance(value, bool):
        return Markup({None: figures.ABSENT, True: "yes", False: "no"}[value])
    text = figures.count(value) if isinstance(value, int) else str(value)
    if ACCOUNT.fullmatch(text):
        return _account_link(text, shown=text)
    if "transaction" in name.lower() and TRANSACTION.fullmatch(text):
        return _tx_link(text, shown=text)
    if name.lower() in ("peer", "signer", "signers", "worker") and PEER.fullmatch(text):
        return _peer_link(text, shown=text)
    return Markup("{}").format(text)
