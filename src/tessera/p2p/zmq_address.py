"""Where a zmq transport listens, and what it tells others of it. Addresses are IP:port; no names are looked up."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import psutil

from tessera.core.errors import Invalid

__all__ = ["is_socket", "parse_bind", "reachable"]


def is_socket(text: str) -> bool:
    """Whether this can be dialled: 203.0.113.7:4433 or [2001:db8::7]:4433."""
    return _split(text, lowest=1) is not None


def parse_bind(bind: str) -> str:
    """Raises `Invalid` for anything but an IP address and a port, 0 for any free one."""
    if _split(bind, lowest=0) is None:
        raise Invalid(f"cannot listen on {bind!r}: an address looks like 0.0.0.0:4433")
    return bind


def reachable(bound: str) -> list[str]:
    """The bound address, or those of loopback and all interfaces in the place of 0.0.0.0 and [::]."""
    split = _split(bound, lowest=1)
    if split is None:
        raise Invalid(f"bound to {bound!r}, which is no address")
    host, port = split
    if not ip_address(host).is_unspecified:
        return [bound]
    families = {socket.AF_INET} if ip_address(host).version == 4 else {socket.AF_INET, socket.AF_INET6}
    interfaces = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
    found = [entry.address for entry in interfaces if entry.family in families]
    hosts = ["127.0.0.1", *(host for host in found if "%" not in host)]  # link-local addresses need a zone
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in dict.fromkeys(hosts)]


def _split(text: str, *, lowest: int) -> tuple[str, int] | None:
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    try:
        version = ip_address(bare).version
    except ValueError:
        return None
    sound = host == (f"[{bare}]" if version == 6 else bare) and port.isascii() and port.isdigit() and len(port) <= 5
    return (bare, int(port)) if sound and "%" not in bare and lowest <= int(port) < 65_536 else None
