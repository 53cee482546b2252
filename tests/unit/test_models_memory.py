"""How much memory is free, inside and outside control groups."""

from pathlib import Path

import pytest

from tessera.models import memory


def group(folder: Path, version: int, limit: str, used: int, cache: int) -> None:
    names = memory._FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


def test_the_tightest_control_group_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    group(tmp_path / "a" / "b", 2, "1000", 400, 100)
    group(tmp_path / "a", 2, "900", 500, 50)
    group(tmp_path / "memory" / "c", 1, "5000", 1000, 0)
    group(tmp_path / "memory", 1, str(2**63 - 4096), 1, 0)
    found = list(memory._group_free("4:cpu:/x\n3:memory:/c\n0::/a/b\n"))
    assert found == [4000, None, 700, 450, None]


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    group(tmp_path / "a", 2, "1000", 4000, 0)
    assert next(memory._group_free("0::/a")) == 0


def test_this_machine_has_memory_left() -> None:
    assert 0 < memory.free_ram_bytes() < 2**60
