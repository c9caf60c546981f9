"""How much memory there is."""

from pathlib import Path

import psutil
import pytest

from icm import memory

GB = 1_000_000_000


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of a process in /job/step, without limits; so much memory is free: 8 GB."""
    (tmp_path / "job" / "step").mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("3:cpuset:/elsewhere\n0::/job/step\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "CGROUP_OF_THIS", own)
    free = psutil.virtual_memory()._replace(available=8 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    return tmp_path


def limit(group: Path, most: str, used: int, cached: int) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    stat = f"anon {used - cached}\nfile {cached + 7}\ninactive_file {cached - 5}\nactive_file 5\n"
    (group / "memory.stat").write_text(stat)


def test_without_limits_it_is_what_the_machine_has(groups: Path) -> None:
    assert memory.available_bytes() == 8 * GB
    limit(groups / "job" / "step", "max", 5 * GB, GB)
    assert memory.available_bytes() == 8 * GB
    (groups / "own").unlink()  # another system
    assert memory.available_bytes() == 8 * GB


def test_the_narrowest_limit_of_a_job_counts_and_cached_files_are_free(groups: Path) -> None:
    limit(groups / "job" / "step", str(7 * GB), 4 * GB, 3 * GB)
    assert memory.available_bytes() == 6 * GB
    limit(groups / "job", str(6 * GB), 5 * GB, 3 * GB)
    assert memory.available_bytes() == 4 * GB
    limit(groups, str(20 * GB), 5 * GB, 3 * GB)
    assert memory.available_bytes() == 4 * GB
