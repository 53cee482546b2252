"""A systemd unit for a long-running command: started again when it fails, and shut in as far as it can work.

Pure text, so that a test compares every line. A unit is readable to everybody: nothing in it is secret, a passphrase
comes as a credential. What stands in it is escaped as systemd reads it: `%` begins a specifier, `$` a variable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tessera.cli.passphrases import CREDENTIAL
from tessera.core.errors import Invalid

__all__ = ["MARK", "UnitFile"]

MARK = "# Written by `tessera service install`; `tessera service uninstall` removes it."
MEND_STATUS = 2  # our exit status for input that has to be mended: starting again does not help

# What a node needs none of: others' files, new rights, odd sockets and system calls. GPUs stay visible, and code that
# is compiled while it runs stays possible: torch needs both.
EVERYWHERE = (
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "ProtectHome=read-only",
    "PrivateTmp=yes",
    "LockPersonality=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallErrorNumber=EPERM",
    "UMask=0077",
)
SYSTEM_ONLY = (  # a user's manager has no such rights to take away
    "CapabilityBoundingSet=",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
)

_PLAIN = re.compile(r"[A-Za-z0-9_@/.,:=+-]+")
_SIZE = re.compile(r"\d+(\.\d+)?[KMGT]?")


@dataclass(frozen=True)
class UnitFile:
    """What a unit says. Raises `Invalid` for what cannot stand in one."""

    description: str
    command: Sequence[str]  # the program by its whole path, and its words
    writable: Sequence[Path]  # everything else on the disk can only be read
    system: bool
    user: str = ""  # who runs it, of a system's unit
    environment: Mapping[str, str] = field(default_factory=dict)
    passphrase_file: Path | None = None
    memory_max: str = ""  # 8G

    def __post_init__(self) -> None:
        if self.memory_max and not _SIZE.fullmatch(self.memory_max):
            raise Invalid(f"--memory-max is a size such as 8G, not {self.memory_max!r}")

    def text(self) -> str:
        """The whole file."""
        return "\n".join([MARK, "", *self._unit(), "", *self._service(), "", *self._install(), ""])

    def _unit(self) -> list[str]:
        return [
            "[Unit]",
            f"Description={_value(self.description)}",
            *(["After=network-online.target", "Wants=network-online.target"] if self.system else []),
            "StartLimitIntervalSec=0",  # a network may be away for a night: it never gives up
        ]

    def _service(self) -> list[str]:
        lines = ["[Service]", "Type=exec", f"ExecStart={' '.join(_word(word) for word in self.command)}"]
        lines += [f"Environment={_word(f'{name}={value}')}" for name, value in sorted(self.environment.items())]
        if self.system and self.user:
            lines.append(f"User={_value(self.user)}")
        if self.passphrase_file is not None:
            lines.append(f"LoadCredential={CREDENTIAL}:{_value(str(self.passphrase_file))}")
        lines += [
            "Restart=on-failure",
            f"RestartPreventExitStatus={MEND_STATUS}",
            "RestartSec=5",
            "RestartSteps=8",  # longer each time, from systemd 254 on; before that every 5 s
            "RestartMaxDelaySec=600",
            "TimeoutStopSec=60",
            "LimitNOFILE=65536",
        ]
        if self.memory_max:
            lines.append(f"MemoryMax={self.memory_max}")
        lines += [f"ReadWritePaths={_word(str(path))}" for path in self.writable]
        return [*lines, *EVERYWHERE, *(SYSTEM_ONLY if self.system else ())]

    def _install(self) -> list[str]:
        return ["[Install]", f"WantedBy={'multi-user' if self.system else 'default'}.target"]


def _value(text: str) -> str:
    if not text or any(not c.isprintable() for c in text):
        raise Invalid(f"this cannot stand in a unit: {text!r}")
    return text.replace("%", "%%")


def _word(text: str) -> str:
    """One word of a command line as systemd splits it.

    >>> _word('/opt/a b'), _word('50%'), _word('$HOME')
    ('"/opt/a b"', '"50%%"', '"$$HOME"')
    """
    escaped = _value(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return text if _PLAIN.fullmatch(text) else f'"{escaped}"'
