"""A zmq socket in an event loop: what arrives is handed on at once, what is sent never waits.

A zmq socket's descriptor is an edge: it says once that something has happened, and sending may take that word away. So
the socket is emptied whenever the descriptor speaks and after every send. `copy=False` keeps what the engine knows of
each message: whose key proved the connection, and which descriptor it came on.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
import zmq
from zmq.utils.monitor import parse_monitor_message

from tessera.core.errors import Unavailable

__all__ = ["ZmqMonitor", "ZmqPort", "kick", "peer_name"]

BATCH = 64  # messages handed on before other tasks have their turn

Parts = list[zmq.Frame]


class ZmqPort:
    """Owns `socket_`. Whoever made it closes it, after `run` has ended.

    Args:
        on_message: gets the parts of each message. It must not wait, and must not raise but for our own bugs.
    """

    def __init__(self, socket_: zmq.Socket[bytes], on_message: Callable[[Parts], None]) -> None:
        self._socket, self._on_message = socket_, on_message
        self._pumping = self._closed = self._due = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if self.pump():
                await anyio.lowlevel.checkpoint()
            else:
                await anyio.wait_readable(self._socket.FD)

    def pump(self) -> bool:
        """Hand on what has arrived, `BATCH` messages at most; whether there may be more."""
        if self._closed or self._pumping:
            return False
        self._pumping = True
        try:
            for _ in range(BATCH):
                try:
                    parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    return False
                self._on_message(parts)
                if self.closed:
                    return False
            return True
        finally:
            self._pumping = False

    def send(self, parts: list[bytes]) -> bool:
        """False when the queue is full. Raises `Unavailable` when there is nobody to send to."""
        if self._closed:
            raise Unavailable("the socket is closed")
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise Unavailable(f"the connection is gone: {error}") from error
        finally:
            self._look_again()
        return True

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._socket.close()

    def _look_again(self) -> None:
        if not self._due and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._due = True
            asyncio.get_running_loop().call_soon(self._pump_later)

    def _pump_later(self) -> None:
        self._due = False
        if self.pump():
            self._look_again()


class ZmqMonitor:
    """Tells of a socket's connections: `on_event(event, value)`; the value is mostly a descriptor."""

    def __init__(self, watched: zmq.Socket[bytes], events: int, on_event: Callable[[zmq.Event, int], None]) -> None:
        self._watched, self._on_event = watched, on_event
        self.port = ZmqPort(watched.get_monitor_socket(events), self._told)

    def close(self) -> None:
        """Before the watched socket closes. Safe to repeat."""
        if not self._watched.closed:
            self._watched.disable_monitor()
        self.port.close()

    def _told(self, parts: Parts) -> None:
        told: Any = parse_monitor_message([part.bytes for part in parts])
        self._on_event(zmq.Event(told["event"]), int(told["value"]))


def peer_name(descriptor: int) -> Any:
    """Who is at the other end of this TCP descriptor of our process, or None when it is none."""
    with _copy(descriptor) as connection:
        return None if connection is None else _name(connection)


def kick(descriptor: int, name: Any) -> bool:
    """End a connection that the engine has no call to end: shut its TCP connection, which the engine takes for its end.

    The descriptor may have been closed and given to another connection in the meantime, hence the name: the copy that
    we look at is the copy that we shut.
    """
    with _copy(descriptor) as connection:
        if connection is None or name is None or _name(connection) != name:
            return False
        with suppress(OSError):  # it ended by itself just now
            connection.shutdown(socket.SHUT_RDWR)
        return True


@contextmanager
def _copy(descriptor: int) -> Iterator[socket.socket | None]:
    """A second handle on a connection, for a moment: while it is open, the connection does not end by being closed."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        yield None
        return
    try:
        connection = socket.socket(fileno=copy)
    except OSError:  # not a socket (any more)
        os.close(copy)
        yield None
        return
    with connection:
        yield connection


def _name(connection: socket.socket) -> Any:
    try:
        return connection.getpeername()
    except OSError:
        return None
