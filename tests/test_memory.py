"""What memory a machine has, has free, and leaves to one of several processes."""

from pathlib import Path

import pytest

from allo_kernels import memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Its files, which may be written."""
    monkeypatch.setattr(
        memory, "Path", lambda *parts: tmp_path.joinpath(*(part.strip("/").replace("/", "-") for part in parts))
    )
    (tmp_path / "sys-fs-cgroup").mkdir()
    return tmp_path


def test_free_memory_is_some_of_all_memory(monkeypatch):
    free = memory.available_bytes()
    assert 1 << 20 < free < memory.device_bytes() or not Path("/proc/meminfo").exists()


def test_what_a_container_may_have_is_less(machine, monkeypatch):
    whole = memory.os.sysconf("SC_PAGE_SIZE") * memory.os.sysconf("SC_PHYS_PAGES")
    assert memory.available_bytes() == whole, "nothing says otherwise"
    (machine / "proc-meminfo").write_text("MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:   4000 kB\n")
    assert memory.available_bytes() == 4000 << 10
    for limit, expected in (("max\n", 4000 << 10), (f"{3000 << 10}\n", 2000 << 10), (f"{500 << 10}\n", 0)):
        (machine / "sys-fs-cgroup/memory.max").write_text(limit)
        (machine / "sys-fs-cgroup/memory.current").write_text(f"{1000 << 10}\n")
        assert memory.available_bytes() == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    (machine / "sys-fs-cgroup/memory.max").write_text("max")
    assert memory.available_bytes() == 1000 << 10, "each process of a machine its share"
