"""The same run over ZeroMQ inside a network of one's own, with its data in a storage behind a URL."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from economy_world import TEXT, command, last_object, run, started, until


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_over_zmq_with_data_behind_a_url(tmp_path: Path) -> None:
    host, worker = tmp_path / "host", tmp_path / "worker"
    file, log = tmp_path / "run.json", tmp_path / "host.log"
    drafted = run(
        command("run", "draft", file, "--data", TEXT, "--stages", 2, "--steps", 20, "--state-dir", host), tmp_path
    )
    assert drafted.returncode == 0, drafted.stderr
    manifest = json.loads(file.read_text())
    manifest["model"]["model"] |= {"width": 64, "ffn": 64, "heads": 2, "kv_heads": 1, "context": 64}
    manifest["schedule"] |= {"length": 64, "microbatches": 4, "evaluate_batches": 4}
    file.write_text(json.dumps(manifest))
    options = ("--workers", 1, "--engine", "zmq", "--blobs", f"file://{tmp_path / 'storage'}", "--port", 0)
    create = command("run", "create", file, *options, "--requests", 2, "--once", "--json", "--state-dir", host)
    with started(create, tmp_path, log) as creating:
        invitation = until(lambda: re.search(r"tessera join (tessera1\S+)", log.read_text()), "an invitation")[1]
        joining = command("join", invitation, "--yes", "--probe-seconds", "0.2", "--state-dir", worker)
        with started(joining, tmp_path, tmp_path / "worker.log") as joined:
            assert creating.wait(200) == 0, log.read_text()[-3000:]
            assert joined.wait(30) == 0
    result = last_object(log.read_text())
    assert result["revenue"] > 0
    assert sum(row["shares"] for row in (*result["workers"], *result["owners"])) == result["total_shares"]
