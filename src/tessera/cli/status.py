"""`tessera status`, `tessera leave` and `tessera pause`: what a worker does, and what its owner wants of it.

They read and write files in the state directory; the worker, if one runs, follows within a second.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tessera.core.errors import Invalid, Missing, TesseraError
from tessera.training.home import Home
from tessera.training.status import WorkerStatus, read_status
from tessera.training.wishes import Wish, make_wish, read_wish

__all__ = ["Verdict", "audited", "duration", "judge", "run_leave", "run_pause", "run_status"]

FRESH_S = 15.0  # a worker writes its status every two seconds
SLOW_STEPS = 5  # a step that takes so many times as long as the last one did is a standstill
QUIET_S = 20.0


@dataclass(frozen=True)
class Verdict:
    """Am I earning, and what holds me back?"""

    earning: bool
    what: str
    advice: str = ""


def judge(status: WorkerStatus, now: float) -> Verdict:
    """One sentence on how it goes, and one on what to do, if anything can be done."""
    if now - status.time > FRESH_S:
        ago = duration(now - status.time)
        return Verdict(False, f"no worker runs here: the last one was seen {ago} ago", "start it again: tessera join")
    if status.pauses:
        return Verdict(False, f"this worker pauses: {status.pauses}", "it goes on by itself when that is over")
    if status.leaving:
        if status.companions:
            return Verdict(True, "leaving as soon as another worker of the stage is in step")
        return Verdict(
            True, "alone at the stage: work and pay go on until another has come", "have the host invite somebody"
        )
    if status.trained:
        if status.settled:
            return Verdict(True, "the model is trained and serves; income is claimed as it comes")
        return Verdict(True, "the model is trained; the last epochs are being settled")
    if status.trouble:
        return Verdict(False, f"no session runs: {status.trouble}", "it is tried again every second")
    if status.last_step is None:
        return Verdict(False, "a session has begun, no step is done yet")
    ended, took = status.last_step
    if now - ended > max(QUIET_S, SLOW_STEPS * took):
        waits = duration(now - ended)
        return Verdict(False, f"the last step ended {waits} ago: a neighbour is slow or away", "tessera doctor")
    return Verdict(True, f"training, {status.tokens_per_step / max(took, 1e-9):,.0f} tokens/s")


def audited(status: WorkerStatus) -> str:
    """Whether our work, and so our share, is checked by somebody who did it again."""
    if not status.audits:
        return "no: this run has no audits"
    return "yes" if status.companions else "no other worker at this stage"


def run_status(state_dir: Path, as_json: bool) -> None:
    """Print how the newest run of this directory does."""
    folder = _newest(Home.existing(state_dir))
    status = read_status(folder)
    verdict = judge(status, time.time())
    if as_json:
        facts = {**status.model_dump(), **asdict(verdict)}
        print(json.dumps(facts))  # noqa: T201  the command's result
        return
    left = (status.steps - status.step) * (status.last_step[1] if status.last_step else 0.0)
    more = f" with {status.companions} more" if status.companions else ""
    rows = [
        ("run", f"{status.name}  {status.run_id[:16]}…"),
        ("seat", f"stage {status.stage} of {status.stages}{more}, paid to {status.account}"),
        ("step", f"{status.step:,} of {status.steps:,}" + (f", {duration(left)} to go" if left else "")),
        ("audited", audited(status)),
        ("income", f"{status.claimable:,} units wait to be claimed"),
        ("stake", f"{status.stake:,} units {status.bond}" if status.stake else "none"),
        ("earning", "yes" if verdict.earning else "no"),
        ("now", verdict.what),
        ("to do", verdict.advice or "nothing"),
    ]
    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", value)
    Console().print(table, highlight=False)


def run_pause(state_dir: Path, wish: Wish) -> None:
    """Have this worker stand still, or go on."""
    _wish(state_dir, wish)
    Console().print("This worker pauses; `tessera resume` goes on." if wish == "pause" else "This worker goes on.")


def run_leave(state_dir: Path, *, stay: bool, wait: bool) -> None:
    """Ask to leave, and wait until the worker has left; or take that back."""
    console = Console()
    folder = _wish(state_dir, "work" if stay else "leave")
    if stay:
        console.print("This worker stays.")
        return
    console.print(
        "This worker leaves as soon as its stage can do without it. Until then it works and is paid as before.\n"
        "The host can invite somebody with `tessera run invite`. To stay after all: tessera leave --stay"
    )
    said = ""
    while wait:
        try:
            verdict = judge(read_status(folder), time.time())
        except TesseraError as error:
            verdict = Verdict(False, error.message)
        if read_wish(folder) != "leave":
            console.print("Done: this worker has left. What you earned stays yours; `tessera claim` pulls it.")
            return
        if verdict.what != said:
            said = verdict.what
            console.print(said, style="dim")
        time.sleep(1.0)


def _wish(state_dir: Path, wish: Wish) -> Path:
    """Note what the owner wants of the newest run. Returns its folder."""
    folder = _newest(Home.existing(state_dir))
    try:
        make_wish(folder, wish)
    except OSError as error:
        raise Invalid(f"cannot write in {folder}: {error.strerror}") from error
    return folder


def _newest(home: Home) -> Path:
    runs = home.runs()
    if not runs:
        raise Missing(f"{home.path} knows no run: join one with `tessera join INVITATION`")
    return home.run_folder(runs[-1])


def duration(seconds: float) -> str:
    """The two largest units of it.

    >>> duration(90)
    '1 min 30 s'
    >>> duration(200_000)
    '2 d 7 h'
    """
    whole = int(max(0.0, seconds))
    parts = [(whole // 86_400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts = parts[1:]
    return " ".join(f"{value} {unit}" for value, unit in parts[:2] if value or len(parts) == 1)
