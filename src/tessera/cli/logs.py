"""Logs go to standard error: short coloured lines for people, the same without colours in a file."""

from __future__ import annotations

import logging
import os
import sys

import structlog

__all__ = ["configure_logs"]


def configure_logs(level: str) -> None:
    """TESSERA_LOG, else `level`: debug, info, warning or error. Third parties' logs from warning on only."""
    name = (os.environ.get("TESSERA_LOG") or level).upper()
    number = logging.getLevelNamesMapping().get(name, logging.INFO)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                pad_event_to=0,
                exception_formatter=structlog.dev.plain_traceback,  # the rich one prints locals: prompts, payloads
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
