"""Where logs go: short lines on standard error for people, and JSON lines in a bounded file for whoever looks later.

A long-running command keeps `logs/<name>.log` in its state directory: at most `KEPT + 1` files of `FILE_BYTES`, which
their owner alone can read. What must never be logged is taken out on the way, whoever logs it: fields that hold
prompts, keys or payloads, and invitations, tokens and passwords inside a text.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import structlog

from tessera.cli.settings import current_settings

__all__ = ["FILE_BYTES", "KEPT", "configure_logs", "forget_logs", "redact"]

FILE_BYTES = 5_000_000
KEPT = 4  # full files beside the one that is written
HIDDEN = "(hidden)"
TEXT_LIMIT = 8 * 1024  # characters of one text
SECRET_FIELDS = {
    "answer", "api_key", "authorization", "body", "completion", "content", "invitation", "key", "messages",
    "passphrase", "password", "payload", "private_key", "prompt", "secret", "seed", "signing_key", "text", "token",
}  # fmt: skip

_SECRETS = re.compile(
    r"(?P<invitation>\btessera1)[0-9A-Za-z_=-]{16,}"
    r"|(?P<login>://[^/\s:@]{0,200}):[^/\s@]{1,200}(?=@)"
    r"|(?P<token>https?://[^\s#\"']{1,300}#)[^\s\"']+"
    r"|(?P<bearer>\b[Bb]earer\s+)[\w.~+/=-]{8,}"
)


def configure_logs(level: str, file: Path | None = None) -> None:
    """Log from `level` on, and into `file` from info on; `--log` overrules both. Third parties: warnings only.

    `file` lies in `<state directory>/logs`; it is made once the directory is one.
    """
    settings = current_settings()
    shown = logging.getLevelNamesMapping()[(settings.log or level).upper()]
    kept = logging.getLevelNamesMapping()[settings.log.upper()] if settings.log else min(shown, logging.INFO)
    number = shown if file is None else min(shown, kept)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    forget_logs()
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handlers: list[logging.Handler] = []
    if file is not None:
        handlers.append(_formatted(_StateLog(file), _json_lines(), shared))
    if settings.log_stderr or not handlers:
        last = _json_lines() if settings.log_format == "json" else _console()
        handlers.append(_formatted(logging.StreamHandler(sys.stderr), last, shared))
        handlers[-1].setLevel(shown)
    root = logging.getLogger()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("tessera").setLevel(number)


def forget_logs() -> None:
    """Undo what `configure_logs` did, and close its file."""
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler.formatter, _Formatter)]:
        root.removeHandler(old)
        if isinstance(old, _StateLog):
            old.close()
    root.setLevel(logging.WARNING)
    logging.getLogger("tessera").setLevel(logging.NOTSET)
    structlog.reset_defaults()


def redact(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: the same event without what must not be kept."""
    return {name: _clean(name, value, 0) for name, value in event.items()}


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Ours, so that a second call finds what the first one set up."""


class _StateLog(RotatingFileHandler):
    """A bounded log file that appears when its state directory does."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, maxBytes=FILE_BYTES, backupCount=KEPT, encoding="utf-8", delay=True)
        self._state = file.parent.parent
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is None and not (self._state / "version").exists():
            return  # not a state directory yet, or somebody else's folder
        super().emit(record)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(mode=0o700, exist_ok=True)
        stream = super()._open()
        Path(self.baseFilename).chmod(0o600)
        return stream

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk must not stop the work; said once."""
        error = sys.exc_info()[1]
        if not self._failed:
            self._failed = True
            sys.stderr.write(f"tessera: cannot write {self.baseFilename}: {error}\n")


def _formatted(
    handler: logging.Handler, last: list[structlog.typing.Processor], shared: list[structlog.typing.Processor]
) -> logging.Handler:
    formatter = _Formatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        keep_exc_info=False,
    )
    handler.setFormatter(formatter)
    return handler


def _json_lines() -> list[structlog.typing.Processor]:
    return [structlog.processors.format_exc_info, redact, structlog.processors.JSONRenderer(default=str)]


def _console() -> list[structlog.typing.Processor]:
    return [
        structlog.processors.format_exc_info,  # the pretty traceback prints locals: prompts, payloads
        redact,
        _clock_time,
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        ),
    ]


def _clock_time(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """People read the local time of day."""
    from datetime import datetime

    stamp = datetime.fromisoformat(str(event["timestamp"]).replace("Z", "+00:00"))
    event["timestamp"] = stamp.astimezone().strftime("%H:%M:%S")
    return event


def _clean(name: str, value: Any, depth: int) -> Any:
    if name.lower() in SECRET_FIELDS and depth < 4:
        return HIDDEN
    if isinstance(value, str):
        return _SECRETS.sub(_hide, value[:TEXT_LIMIT])
    if isinstance(value, bytes | bytearray | memoryview):
        return f"({len(value)} bytes)"
    if isinstance(value, dict):
        return {str(key): _clean(str(key), inner, depth + 1) for key, inner in value.items()} if depth < 4 else HIDDEN
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean("", inner, depth + 1) for inner in value] if depth < 4 else HIDDEN
    return value if isinstance(value, bool | int | float | None) else _clean("", str(value), depth)


def _hide(match: re.Match[str]) -> str:
    return next(part for part in match.groupdict().values() if part is not None) + HIDDEN
