"""How figures read: one wording for page and terminal, so that they say the same in the same words.

Invariants: what somebody owns is never rounded up; an absent figure reads as a dash, never as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from tessera.core.amount import Amount
from tessera.devnet.snapshot import SHARE_DECIMALS, Income, Snapshot

__all__ = [
    "ABSENT", "Figure", "bytes_text", "clock_text", "compact", "count", "headlines", "loss_text", "money",
    "money_column", "percent_down", "progress", "shares_down", "short",
]  # fmt: skip

ABSENT = "–"
_PREFIXES = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and what to hold it against. `name` is stable, for tests and styles."""

    name: str
    label: str
    value: str
    unit: str
    note: str


def headlines(snapshot: Snapshot) -> tuple[Figure, ...]:
    """The four figures that say how a run does."""
    income = snapshot.income
    speed = ABSENT if snapshot.tokens_per_s is None else count(round(snapshot.tokens_per_s))
    wire = _number(snapshot.wire_bytes_per_token)
    paid = f"{count(income.requests_paid)} request{'' if income.requests_paid == 1 else 's'} paid"
    return (
        Figure("loss", "Validation loss", loss_text(snapshot.val_loss), "nats/token", _against_bigram(snapshot)),
        Figure("wire", "On the wire", wire, "B/token", _against_dense(snapshot)),
        Figure("speed", "Speed", speed, "tokens/s", f"{compact(snapshot.tokens)} tokens so far"),
        Figure("revenue", "Revenue", _coins(income.revenue, income), income.asset, paid),
    )


def progress(snapshot: Snapshot) -> float:
    """The part of the training that is done, 0 to 1."""
    return min(1.0, snapshot.step / snapshot.steps) if snapshot.steps > 0 else 0.0


def loss_text(loss: float | None) -> str:
    return ABSENT if loss is None else f"{loss:.3f}"


def money(units: int, income: Income) -> str:
    """Exact, in whole coins.

    >>> money(1_500_000, Income())
    '1.5 tUSD'
    """
    return Amount(units, income.asset).format(income.decimals)


def money_column(units: int, income: Income) -> str:
    """The same with all decimals, so that the digits of a column stand below each other.

    >>> money_column(1_500_000, Income())
    '1.500000 tUSD'
    """
    whole, rest = divmod(units, 10**income.decimals)
    fraction = f".{rest:0{income.decimals}d}" if income.decimals else ""
    return f"{count(whole)}{fraction} {income.asset}"


def shares_down(units: int, decimals: int | None = None) -> str:
    """Shares cut to `decimals`; by default to none, or to four below a hundred.

    >>> shares_down(1_234 * 10**18 + 1), shares_down(99_999_999 * 10**12), shares_down(1, 6)
    ('1,234', '99.9999', '0.000000')
    """
    whole, rest = divmod(units, 10**SHARE_DECIMALS)
    if decimals is None:
        decimals = 0 if units == 0 or whole >= 100 else 4
    fraction = f".{rest:0{SHARE_DECIMALS}d}"[: decimals + 1] if decimals else ""
    return count(whole) + fraction


def percent_down(part: int, whole: int) -> str:
    """With two decimals, rounded down.

    >>> percent_down(2, 3)
    '66.66 %'
    """
    hundredths = part * 10_000 // whole if whole > 0 else 0
    return f"{hundredths // 100}.{hundredths % 100:02d} %"


def count(number: int) -> str:
    return f"{number:,}"


def compact(number: float) -> str:
    """Three digits and a prefix.

    >>> compact(950), compact(3_145_728), compact(12_300_000_000)
    ('950', '3.15 M', '12.3 G')
    """
    scaled, prefix = float(number), 0
    while abs(scaled) >= 999.5 and prefix < len(_PREFIXES) - 1:
        scaled, prefix = scaled / 1_000, prefix + 1
    if prefix == 0:
        return f"{scaled:.0f}"
    return f"{scaled:.{max(0, 3 - len(str(int(abs(scaled)))))}f} {_PREFIXES[prefix]}"


def bytes_text(number: int) -> str:
    """
    >>> bytes_text(512), bytes_text(1_234_567)
    ('512 B', '1.23 MB')
    """
    text = compact(number)
    return text + ("B" if " " in text else " B")


def short(name: str) -> str:
    """An id, an address or a hash in a few characters.

    >>> short("0x52908400098527886E0F7030069857D2E4169EE7"), short("ab" * 32)
    ('0x5290…9EE7', 'ababab…abab')
    """
    return name if len(name) <= 13 else f"{name[:6]}…{name[-4:]}"


def clock_text(seconds: float) -> str:
    """Hours, minutes and seconds, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S")


def _against_bigram(snapshot: Snapshot) -> str:
    loss, bigram = snapshot.val_loss, snapshot.bigram_loss
    if bigram is None:
        return "not measured yet"
    if loss is None:
        return f"bigram has {loss_text(bigram)}"
    return f"{abs(bigram - loss):.3f} {'under' if loss < bigram else 'above'} bigram"


def _against_dense(snapshot: Snapshot) -> str:
    wire, dense = snapshot.wire_bytes_per_token, snapshot.dense_bytes_per_token
    if dense is None:
        return "not measured yet"
    return f"1/{dense / wire:.1f} of dense" if wire else f"dense: {_number(dense)}"


def _number(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _coins(units: int, income: Income) -> str:
    return money(units, income).removesuffix(f" {income.asset}")
