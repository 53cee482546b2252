"""The tutorials, followed word by word: every command is typed on a machine of its own, every line must appear.

A machine is an empty home with its own processes. In a `console` block, `name$ command` is typed there, `name$ ^C` is
Ctrl-C for what runs there, `name> text` must appear there later, a question's answer stands behind it, and any other
line must appear after the command before it. `…` stands for anything. A name in the command that was cut with `…` is
completed from what was printed before.
"""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAYS = ("tessera run create", "tessera join")  # these do not end by themselves
PATIENCE_S = 400.0
ANSWERS = re.compile(r"^(.*\[Y/n\]:) (\w+)$")


class Terminal:
    """A command that runs in a terminal of its own, and what it has written."""

    def __init__(self, line: str, home: Path, *, interactive: bool) -> None:
        self.written, self.seen = "", 0
        environment = {
            "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "160",
            "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8", "TERM": "dumb",
        }  # fmt: skip
        ours, theirs = pty.openpty()
        self._keyboard = ours
        output = theirs if interactive else subprocess.PIPE
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=home, env=environment, stdin=theirs, stdout=output,
            stderr=output if interactive else subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        source = ours if interactive else self.process.stdout.fileno()  # type: ignore[union-attr]
        self._reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self._reader.start()

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def expect(self, text: str) -> None:
        """`text` appears after what was expected last."""
        pattern = re.compile(".*?".join(re.escape(part) for part in re.split("…", text.strip())))
        deadline = time.monotonic() + PATIENCE_S
        while not (found := pattern.search(self.written, self.seen)):
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(5)
                found = pattern.search(self.written, self.seen)
            if not found and (ended or time.monotonic() > deadline):
                raise AssertionError(f"{text!r} does not appear in:\n{self.written[self.seen :][-4000:]}")
            if found:
                break
            time.sleep(0.05)
        self.seen = found.end()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def end(self) -> None:
        if self.process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self.interrupt()
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(5)
        os.close(self._keyboard)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self, source: int) -> None:
        with suppress(OSError):  # a terminal whose process is gone
            while data := os.read(source, 65_536):
                self.written += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace")).replace("\r", "")


def blocks(text: str) -> Iterator[str]:
    """Every line of every `console` block, in order."""
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S):
        yield from block.splitlines()


def follow(text: str, folder: Path) -> None:
    running: dict[str, Terminal] = {}
    current: Terminal | None = None
    everything: list[Terminal] = []
    try:
        for line in blocks(text):
            if match := re.fullmatch(r"(\w+)\$ (.*)", line):
                name, command = match.groups()
                if command == "^C":
                    running.pop(name).interrupt()
                    continue
                finish(current, running)
                home = folder / name
                home.mkdir(exist_ok=True)
                stays = command.startswith(STAYS)
                complete = completed(command, everything)
                current = Terminal(complete, home, interactive=command.startswith("tessera join"))
                everything.append(current)
                if stays:
                    running[name] = current
            elif match := re.fullmatch(r"(\w+)> (.*)", line):
                running[match[1]].expect(match[2])
            elif line != "…" and current is not None:
                answer = ANSWERS.match(line)
                current.expect(answer[1] if answer else line)
                if answer:
                    current.type(answer[2] + "\n")
        finish(current, running)
    finally:
        for terminal in reversed(everything):
            terminal.end()


def finish(terminal: Terminal | None, running: dict[str, Terminal]) -> None:
    """A command that ends by itself has ended well."""
    if terminal is not None and terminal not in running.values():
        assert terminal.process.wait(PATIENCE_S) in (0, -signal.SIGINT, 130), terminal.written[-4000:]


def completed(command: str, before: list[Terminal]) -> str:
    """`tessera1…` becomes the last word that was printed and begins so."""
    cut = re.search(r"(\S{4,})…", command)
    if cut is None:
        return command
    words = [word for terminal in before for word in re.findall(re.escape(cut[1]) + r"\S+", terminal.written)]
    assert words, f"nothing that begins with {cut[1]} was printed"
    return command.replace(cut[0], words[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md")))
def test_a_tutorial_can_be_followed_word_by_word(name: str, tmp_path: Path) -> None:
    follow((ROOT / "docs" / "tutorials" / f"{name}.md").read_text(), tmp_path)
