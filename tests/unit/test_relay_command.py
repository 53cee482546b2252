"""`tessera relay`: what it prints, what it takes, how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from p2p_world import key
from tessera.cli.relay import read_tokens
from tessera.core.errors import Invalid, Missing, Refused
from tessera.p2p.relay.frames import Kind
from tessera.p2p.relay.probe import Visitor, probe_relay
from tessera.p2p.relay.url import RelayUrl

RUN = "import typer, sys; from tessera.cli.relay import relay; typer.run(relay)"


def run_relay(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.anyio
async def test_it_prints_its_url_serves_and_ends_in_order(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("# who may use it\n\nthe-first-token\nthe-other-token\n")
    process = run_relay("--port", "0", "--token-file", str(tokens), "--rate", "80Mbit", "--json")
    try:
        assert process.stdout is not None
        told = json.loads(await anyio.to_thread.run_sync(process.stdout.readline))
        assert (told["token"], told["rate"], told["udp"]) == (True, "80Mbit", True)
        port = RelayUrl(told["url"]).port
        here = RelayUrl(f"http://127.0.0.1:{port}", "the-other-token")
        await probe_relay(here.url, here.token)
        with pytest.raises(Refused):
            await probe_relay(here.url, "no-such-token")
        guest = await Visitor.enter(here, key(1))
        process.send_signal(signal.SIGTERM)
        with anyio.fail_after(5):
            assert (await guest.hear())[0] == Kind.RESTARTING
            out, logs = await anyio.to_thread.run_sync(process.communicate)
        await guest.leave()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert out == ""
    assert f"peer_id={key(1).id}" in logs
    assert "relay_client_down" in logs
    assert "token" not in logs, "tokens are not logged"


def test_tokens_come_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="nowhere"):
        read_tokens(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(Invalid, match="open to everybody"):
        read_tokens(empty)
    empty.write_bytes(b"x" * 70_000)
    with pytest.raises(Invalid, match="65536"):
        read_tokens(empty)
    assert read_tokens(None) == ()
