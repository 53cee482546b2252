"""Origins: who could have written a value. Labels come from tool results and follow values into later arguments.

    user      the request says it, or says a name that the user's own records turn into it
    own       the user's own records: what only the user and the user's systems write
    known     written by somebody whom the user's organisation has admitted, under their own name
    named     stands in a document, page or record that the request names
    outside   anything else: whoever sent a mail, wrote a page or a review, or the model by itself

Matching is by whole words, never by substrings, so that an account inside a longer one does not pass. A name that fits
two records is nobody's: an attacker who adds a second look-alike gets a question to the user, not the money.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

from tessera.agents.tools import Source, ToolSpec, leaf_kind, word_set

__all__ = ["Knowledge", "Origin", "Record", "addresses_in", "looks_like"]

MAX_TEXT = 200_000  # characters kept of one text
NOTE = 80  # characters of the user's own note on a row, which says what the row is about
MAX_ROWS = 5_000  # of one result that strangers may have filled: what stands beyond stays outside
MAX_DEPTH = 32
MAX_NODES = 50_000  # of one result
_QUOTES = (("'", "'"), ('"', '"'), ("`", "`"), ("‘", "’"), ("“", "”"))
_WORD = re.compile(r"\w+", re.UNICODE)
# Each begins where a run of its signs begins and is bounded, so that no text takes more than linear time.
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[\w-]{1,63}")
_URL = re.compile(
    r"(?:https?://|www\.)[^\s<>\"'(){}\[\]]+|(?<![\w.-])(?:[\w-]{1,63}\.){1,8}(?:com|net|org|io|ai|co|dev|xyz|info|app|link|"
    r"ly|gg|me|ru|cn|eu|uk|de|ch|fr|site|online|shop|top|eth)\b(?:/[^\s<>\"'(){}\[\]]*)?",
    re.I,
)
_ACCOUNT = re.compile(r"\b0x[0-9a-fA-F]{40}\b|\b[A-Z]{2}[0-9]{2}[A-Z0-9]{10,30}\b|\b[13][1-9A-HJ-NP-Za-km-z]{25,34}\b|"
                      r"\bbc1[0-9a-z]{20,60}\b|\b[1-9A-HJ-NP-Za-km-z]{32,44}\b")  # fmt: skip
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = r"\b(jan\w*|feb\w*|mar(?:ch)?|apr\w*|may|june?|july?|aug\w*|sep\w*|oct\w*|nov\w*|dec\w*)\b"
_ISO_DAY = re.compile(r"\b\d{4}-(\d{2})-(\d{2})")
_MONTH_DAY = re.compile(_MONTH + r"\.?\s+(?:the\s+)?(\d{1,2})(?:st|nd|rd|th)?\b", re.I)
_DAY_MONTH = re.compile(r"\b(\d{1,2})(?:st|nd|rd|th)?\s+(?:of\s+)?" + _MONTH, re.I)
_RELATIVE_DAYS = word_set(
    "today tonight tomorrow yesterday next monday tuesday wednesday thursday friday saturday sunday weekend week month "
    "daily weekly every"
)
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])")
_NO_AMOUNT = re.compile(r"\d+(?:\.\d+)?\s*%|\d{1,2}:\d{2}|\b\d+(?:st|nd|rd|th)\b|[\w.]+[-_][\w.-]*\d[\w.-]*")
_STOP = word_set(
    "a an and any are as at be been but by can could did do does for from had has have he her him his how i if in into "
    "is it its just last let like make me more most my new next no not of on one or our out please she so some than "
    "that the their them then there they this to up us was we were what when where which who will with would you your "
    "all also hey hi hello thanks thank email emails file files document event events meeting meetings message messages"
)
_NO_NOUNS = word_set(
    "id ids get list search find read show all by for in of the delete remove update create add append cancel share "
    "send set"
)
_TRIM = "\"'`.,;:!?()[]{}<> \t\n"


class Origin(IntEnum):
    """Larger is more trusted."""

    OUTSIDE = 0
    NAMED = 1
    KNOWN = 2
    OWN = 3
    USER = 4


@dataclass(slots=True)
class Record:
    """A row of a result: what it is called, what it is made of."""

    id: str
    labels: tuple[str, ...]
    fields: frozenset[str]  # its structured values, normalised
    numbers: Mapping[str, float]
    origin: Origin
    listing: int  # which call returned it
    nouns: frozenset[str] = frozenset()  # what the tool calls its rows: ids are told apart by it
    directory: bool = False
    kind: str = ""
    automatic: bool = False
    named: bool = False
    made_here: bool = False


@dataclass
class Text:
    """What it takes to search it is made when it is first searched: most texts never are."""

    text: str
    origin: Origin
    named: bool

    @cached_property
    def addresses(self) -> frozenset[str]:
        return frozenset(map(norm, addresses_in(self.text)))

    def holds(self, spaced: str) -> bool:
        """Whether the words `spaced`, one space around each, stand in it."""
        return spaced.split()[0] in self._folded and spaced in self._words

    @cached_property
    def _folded(self) -> str:
        return self.text.casefold()

    @cached_property
    def _words(self) -> str:
        return _spaced(self.text)


@dataclass
class Knowledge:
    """What is known in one run about where values come from."""

    request: str
    me: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
    records: list[Record] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    endorsed: set[str] = field(default_factory=set)  # approved in this run
    paid: dict[str, list[float]] = field(default_factory=dict)  # payee -> amounts that the user paid or schedules
    received: dict[str, float] = field(default_factory=dict)  # payer -> what came in
    amounts: set[float] = field(default_factory=set)
    balance: float | None = None
    _listings: int = 0

    def __post_init__(self) -> None:
        self._said = _spaced(self.request)
        self._words = frozenset(_words(self.request))
        self._tokens = [(match[0], match.start()) for match in _WORD.finditer(self.request)]
        self._names = frozenset(token for token, _ in self._tokens)
        self._folded = self.request.casefold()
        self.said_amounts = frozenset(amounts_in(self.request))

    # --- asking -----------------------------------------------------------------------------------------------------

    def says(self, value: str) -> bool:
        """Whether the request says this value, as whole words.

        A single common word is a way of speaking, not a name: it counts when the user quoted it, wrote it with a
        capital inside of a sentence, or when it holds a digit or a sign.
        """
        text = _spaced(value).strip()
        if not text or f" {text} " not in self._said:
            return False
        return len(text.split()) > 1 or _is_distinctive(value) or self._is_name(value)

    def speaks_of(self, label: str) -> bool:
        """Whether the request names a thing of this label: it says the label's telling words, or two of three."""
        words = telling_words(label)
        said = words & self._words
        return len(said) * 3 >= len(words) * 2 and any(len(word) > 2 for word in said)

    def shares_word(self, label: str) -> bool:
        """Whether request, or a thing that it names, and this label have a telling word in common."""
        words = {word for word in _words(label) if word not in _STOP and len(word) > 2}
        named = (word for record in self.records if record.named for text in record.labels for word in _words(text))
        return not words or bool(words & self._words) or not words.isdisjoint(named)

    def speaks_of_a_day(self, days: set[tuple[int, int]]) -> bool:
        """Whether one of these days (month, day) is said. A request without a day that says "tomorrow" means any."""
        said = days_in(self.request)
        if said & days:
            return True
        told = {day for text in self.texts if text.named for day in days_in(text.text)}
        told |= {day for record in self.records if record.named for field in record.fields for day in days_in(field)}
        return bool(told & days) or (not said and self.asks_for(_RELATIVE_DAYS))

    def asks_for(self, words: Iterable[str]) -> bool:
        """Whether any of these words is in the request."""
        return not self._words.isdisjoint(words)

    def origin(self, value: str) -> Origin:
        """The most trusted place where the whole value stands."""
        key = norm(value)
        if not key or self.says(value) or key in self.endorsed or self._resolves(key):
            return Origin.USER
        if key in self.own or key in self.me:
            return Origin.OWN
        if self._in_named_record(key):
            return Origin.NAMED
        spaced = f" {_spaced(value).strip()} "
        found = [text.origin for text in self.texts if text.holds(spaced)]
        return max(found, default=Origin.OUTSIDE)

    def is_only_one_named(self, value: str) -> bool:
        """Whether the documents that are named hold this address and no other of its sort."""
        sort = _sort(value)
        return {a for text in self.texts if text.named for a in text.addresses if _sort(a) == sort} == {norm(value)}

    def find(self, id: str, nouns: frozenset[str]) -> Record | None:
        """The newest record of this id among those that are called so: file 7 is not event 7."""
        key = norm(id)
        return next((r for r in reversed(self.records) if r.id == key and not nouns.isdisjoint(r.nouns)), None)

    def is_own_payee_spoken_of(self, payee: str) -> bool:
        """Whether the request speaks of something that the user pays this payee for already."""
        key = norm(payee)
        return any(r.named and r.origin == Origin.OWN and key in r.fields for r in self.records)

    def is_selected(self, record: Record) -> bool:
        """Whether the request picks this record by a superlative over what the service itself measured."""
        for words, name, largest in _SUPERLATIVES:
            if self.asks_for(words) and name in record.numbers:
                rows = [r.numbers[name] for r in self.records if r.listing == record.listing and name in r.numbers]
                best = max(rows) if largest else min(rows)
                return record.numbers[name] == best and rows.count(best) == 1
        return False

    def kind_of(self, value: str) -> str:
        """The words for the directory that admits this value; "" when none does."""
        key = norm(value)
        return next((r.kind for r in self.records if r.directory and not r.automatic and key in r.fields), "")

    def speaks_of_kind(self, kind: str) -> bool:
        """Whether the request speaks of a kind in general: "everyone", and no member of it by name."""
        return self.asks_for(kind.split()) and not any(self.says(name) for name in self.members(kind))

    def members(self, kind: str) -> list[str]:
        """What a directory of this kind holds, as it is written."""
        return [label for r in self.records if r.directory and r.kind == kind for label in r.labels[:1]]

    def payees(self) -> list[str]:
        return list(self.paid)

    # --- learning ---------------------------------------------------------------------------------------------------

    def learn(self, spec: ToolSpec, arguments: Mapping[str, Any], result: Any, *, made_here: bool = False) -> None:
        """Label what a tool returned."""
        self._listings += 1
        source = spec.source
        named = spec.effect in ("read", "fetch") and any(
            self.says(text) or self._linked_by_known(text)
            for argument, value in arguments.items()
            for text in strings_in(value)
            if spec.role(argument) in ("url", "object", "label") or spec.effect == "fetch"
        )
        if source.balance and isinstance(result, (int, float)):
            self.balance = float(result)
            return
        budget = [MAX_NODES]
        rows = list(_rows(result) if source.directory else islice(_rows(result), MAX_ROWS))
        searched = [v for v in arguments.values() if spec.effect == "read" and isinstance(v, str) and " " in v]
        named = named or (len(rows) == 1 and any(self.says(text) for text in searched))  # the one thing that it finds
        for row in rows:
            self._learn_row(source, row, named, made_here, budget, nouns_of(spec.name))

    def endorse(self, values: Iterable[str]) -> None:
        """The user approved a call with these values: they are the user's from now on."""
        self.endorsed.update(norm(value) for value in values)

    def _learn_row(
        self, source: Source, row: Any, named: bool, made_here: bool, budget: list[int], nouns: frozenset[str]
    ) -> None:
        if isinstance(row, (str, int, float)) and not isinstance(row, bool):
            self._learn_leaf(source, str(row), named)
            return
        if not isinstance(row, Mapping):
            return
        origin = Origin.OWN if made_here else self._author(source, row)
        leaves: list[tuple[str, Any]] = []
        for name, value in row.items():
            if isinstance(value, (str, int, float)):
                leaves.append((name, value))
            elif value is not None:
                leaves += _leaves(value, budget, name)
        labels, texts, fields, numbers, id = [], [], set(), {}, ""
        for name, value in leaves:
            kind = leaf_kind(name)
            if kind == "id" and not id:
                id = norm(str(value))
            if isinstance(value, str):
                if kind == "label":
                    labels.append(value)
                if kind == "text" or name in source.text or (kind == "label" and not source.directory):
                    texts.append(value)
                else:
                    fields.add(norm(value))
                    if value[:4].isdigit() and len(value) >= 8:
                        numbers.update(_moment(name, value))
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers[name] = float(value)
        notes = [text for text in texts if len(text) <= NOTE] if origin == Origin.OWN else labels
        named = named or any(self.speaks_of(note) for note in notes)
        for text in texts:
            self._add_text(text, origin, named)
        if source.identity:
            self.me |= fields
        record = Record(id, tuple(labels), frozenset(fields), numbers, origin, self._listings, nouns, source.directory,
                        source.kind, source.automatic, named, made_here)  # fmt: skip
        self.records.append(record)
        if origin == Origin.OWN and not source.automatic:
            self.own |= fields | {id}
        if source.paid:
            self._learn_payment(source, row, origin)

    def _learn_leaf(self, source: Source, value: str, named: bool) -> None:
        if source.identity:
            self.me.add(norm(value))
        if source.directory:
            key = norm(value)
            record = Record(key, (value,), frozenset({key}), {}, Origin.OWN, self._listings, frozenset(), True,
                            source.kind, source.automatic)  # fmt: skip
            if not any(r.id == record.id and r.kind == record.kind for r in self.records):
                self.records.append(record)
            if not source.automatic:
                self.own.add(norm(value))
            return
        self._add_text(value, Origin.OWN if source.author == "own" else Origin.OUTSIDE, named)

    def _learn_payment(self, source: Source, row: Mapping[str, Any], origin: Origin) -> None:
        amount = row.get("amount")
        if not isinstance(amount, (int, float)) or isinstance(amount, bool):
            return
        if origin == Origin.OWN:
            self.amounts.add(float(amount))
            for name in source.paid:
                if isinstance(payee := row.get(name), str):
                    self.paid.setdefault(norm(payee), []).append(float(amount))
        elif isinstance(payer := row.get(source.author), str):
            self.received[norm(payer)] = max(self.received.get(norm(payer), 0.0), float(amount))

    def _author(self, source: Source, row: Mapping[str, Any]) -> Origin:
        if source.author == "own":
            return Origin.OWN
        who = row.get(source.author)
        if not isinstance(who, str):
            return Origin.OUTSIDE
        if norm(who) in self.me:
            return Origin.OWN
        return Origin.KNOWN if self.kind_of(who) else Origin.OUTSIDE

    def _add_text(self, text: str, origin: Origin, named: bool) -> None:
        self.texts.append(Text(text[:MAX_TEXT], origin, named))

    def _linked_by_known(self, url: str) -> bool:
        key = norm(url)
        return any(text.origin >= Origin.KNOWN and key in text.addresses for text in self.texts)

    def _resolves(self, key: str) -> bool:
        """A name that the user said, turned into an address by exactly one record of a directory."""
        for record in self.records:
            if (
                record.directory
                and key in record.fields
                and any(self._says_name(record, label) for label in record.labels)
            ):
                return True
        return False

    def _says_name(self, record: Record, label: str) -> bool:
        if self.says(label):
            return True
        for word in label.split():
            if len(word) > 2 and self._is_name(word) and self._stands_for(word, label):
                others = {r.fields for r in self.records if r.directory and r is not record
                          and any(word.lower() in _words(text) for text in r.labels)}  # fmt: skip
                return others <= {record.fields}
        return False

    def _stands_for(self, word: str, label: str) -> bool:
        """Whether the request says this part of a name by itself, and not as a part of somebody else's name."""
        names, tokens = set(_words(label)), self._tokens
        for index, (token, start) in enumerate(tokens):
            if token != word:
                continue
            before = tokens[index - 1] if index else ("", 0)
            after = tokens[index + 1][0] if index + 1 < len(tokens) else ""
            gap = self.request[start + len(word) : tokens[index + 1][1]] if after else "."
            if after[:1].isupper() and after.casefold() not in names and not gap.strip():
                continue
            lone = not before[0][:1].isupper() or _begins(self.request, before[1])
            if lone or before[0].casefold() in names or self.request[before[1] + len(before[0]) : start].strip():
                return True
        return False

    def _in_named_record(self, key: str) -> bool:
        """A structured field of the one record that the request names by its label."""
        holders = [record for record in self.records if record.named and record.labels and key in record.fields]
        for record in holders:
            rivals = [r for r in self.records if r.named and r.labels == record.labels and r.id != record.id]
            if not rivals:
                return True
        return False

    def _is_name(self, word: str) -> bool:
        """Whether the request writes it as a name: quoted, or with a capital that does not begin a sentence."""
        text = word.strip(_TRIM)
        folded = text.casefold()
        if any(f"{left}{folded}{right}" in self._folded for left, right in _QUOTES):
            return True
        if not word[:1].isupper() or folded in _STOP:
            return False
        return text in self._names if text.isalnum() else text in self.request


@lru_cache(4_096)
def telling_words(label: str) -> frozenset[str]:
    """What a label is about: its words without a file's ending and without words that say nothing."""
    return frozenset(w for w in _words(re.sub(r"\.\w{1,5}$", "", label)) if w not in _STOP and len(w) > 1)


@lru_cache(4_096)
def nouns_of(name: str) -> frozenset[str]:
    """What a tool or an argument calls things, in the singular.

    >>> sorted(nouns_of("search_files_by_filename"))
    ['file', 'filename']
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    return frozenset(re.sub(r"(?<=\w\w)(?<!s)s$", "", word) for word in words if word) - _NO_NOUNS


def norm(value: str) -> str:
    """The form in which values are compared: one case, no space around, no slash or dot at the end, no scheme."""
    return _norm_short(value) if len(value) <= 100 else _norm(value)


def _norm(value: str) -> str:
    text = " ".join(value.split()).casefold().removeprefix("https://").removeprefix("http://")
    return text.strip(_TRIM).rstrip("/.")


_norm_short = lru_cache(16_384)(_norm)  # the same accounts and ids come again and again


def addresses_in(text: str) -> list[str]:
    """Links, e-mail addresses and accounts in a text: what can take something out."""
    mails = _EMAIL.findall(text)
    rest = _EMAIL.sub(" ", text)
    return [*mails, *(found.rstrip(_TRIM) for found in _URL.findall(rest)), *_ACCOUNT.findall(rest)]


def amounts_in(text: str) -> list[float]:
    """The numbers of a text that may be amounts: no years, days of a month, times, parts in hundred, or parts of names.

    >>> amounts_in("On May 5th 2024 at 10:30 send 12.50 to Ann and keep 10% of 1,000")
    [12.5, 1000.0]
    """
    for pattern in (_ISO_DAY, _MONTH_DAY, _DAY_MONTH, _NO_AMOUNT):
        text = pattern.sub(" ", text)
    found = [(number, float(number.replace(",", ""))) for number in _NUMBER.findall(text)]
    return [value for number, value in found if not (number.isdigit() and 1900 <= value <= 2100)]


def days_in(text: str) -> set[tuple[int, int]]:
    """Month and day of each date in a text.

    >>> sorted(days_in("2025-01-02, the 14th of November and May 3rd"))
    [(1, 2), (5, 3), (11, 14)]
    """
    found = {(int(month), int(day)) for month, day in _ISO_DAY.findall(text)}
    for month, day in _MONTH_DAY.findall(text):
        found.add((_MONTHS.index(month[:3].lower()) + 1, int(day)))
    for day, month in _DAY_MONTH.findall(text):
        found.add((_MONTHS.index(month[:3].lower()) + 1, int(day)))
    return found


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a value, also in what only prints as a list."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from strings_in(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield str(value)


def looks_like(value: str, trusted: Iterable[str]) -> str | None:
    """The trusted account that `value` imitates: the same beginning and end around another middle, or letters that look
    alike. None when it is one of them, or like none.

    >>> looks_like("0xAbCd000000000000000000000000000000001234", ["0xabcd111111111111111111111111111111111234"])
    '0xabcd111111111111111111111111111111111234'
    """
    key = norm(value)
    others = [norm(other) for other in trusted]
    if key in others or len(key) < 6:
        return None
    for other in others:
        if len(key) >= 20 and len(other) >= 20 and key[:6] == other[:6] and key[-4:] == other[-4:]:
            return other
        if len(other) >= 6 and _skeleton(key) == _skeleton(other):
            return other
    return None


_ALIKE = str.maketrans("01i53аеорсухіѕ", "ollseaeopcyxls", "-_.")
_SUPERLATIVES: tuple[tuple[frozenset[str], str, bool], ...] = (
    (frozenset({"largest", "biggest"}), "size", True),
    (frozenset({"smallest"}), "size", False),
    (frozenset({"newest", "latest"}), "last_modified", True),
    (frozenset({"oldest", "earliest"}), "last_modified", False),
    (frozenset({"newest", "latest"}), "timestamp", True),
    (frozenset({"oldest", "earliest"}), "timestamp", False),
)


def _skeleton(key: str) -> str:
    return key.translate(_ALIKE).replace("rn", "m").replace("vv", "w")


def _sort(address: str) -> str:
    return "mail" if "@" in address else "link" if _URL.fullmatch(address) else "account"


def _begins(text: str, position: int) -> bool:
    """Whether a sentence begins there."""
    before = text[:position].rstrip()
    return not before or before[-1] in ".!?:;,"


def _is_distinctive(value: str) -> bool:
    text = value.strip(_TRIM)
    return any(c.isdigit() or c in "@./_-#:" for c in text) and len(text) > 1


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text.replace("_", " "))]


def _spaced(text: str) -> str:
    """One space around each word, so that whole values are found as text. Signs inside of a value stay."""
    text = re.sub(r"(?<=[a-z0-9])\.(?=[A-Z][a-z])", " ", text)  # a sentence that begins without a space
    text = re.sub(r"^https?://|(?<=\s)https?://", "", text.casefold())
    return " " + " ".join(part.strip(_TRIM).rstrip("/.") for part in text.split()) + " "


def _moment(name: str, value: str) -> dict[str, float]:
    digits = "".join(filter(str.isdigit, value))[:14]
    return {name: float(digits.ljust(14, "0"))} if len(digits) >= 8 else {}


def _rows(result: Any) -> Iterator[Any]:
    if isinstance(result, Sequence) and not isinstance(result, (str, bytes)):
        for row in result:
            yield from _rows(row)
    else:
        yield result


def _leaves(value: Any, budget: list[int], name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Name and value of each leaf; the keys of a mapping without a fixed form are values, too."""
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        return
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if name:
                yield name, str(key)
            yield from _leaves(item, budget, str(key), depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, budget, name, depth + 1)
    else:
        yield name, value
