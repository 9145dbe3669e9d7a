"""What memory a machine has, has free, and leaves to one of several processes."""

from pathlib import Path

import pytest

from allo_kernels import memory

KIB = 1024


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Its root, which may be written."""
    monkeypatch.setattr(memory, "Path", lambda *parts: tmp_path.joinpath(*(part.lstrip("/") for part in parts)))

    def write(path: str, text: object) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    return write


def test_free_memory_is_some_of_all_memory():
    free = memory.available_bytes()
    assert 1 << 20 < free < memory.device_bytes() or not Path("/proc/meminfo").exists()


def test_what_a_container_may_have_is_less(machine, monkeypatch):
    whole = memory.os.sysconf("SC_PAGE_SIZE") * memory.os.sysconf("SC_PHYS_PAGES")
    assert memory.available_bytes() == whole, "nothing says otherwise"
    machine("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 1 kB")
    assert memory.available_bytes() == whole, "an old kernel"
    machine("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:   4000 kB\nCached: 1 kB")
    assert memory.available_bytes() == 4000 * KIB
    for limit, expected in (("max", 4000), (3000 * KIB, 2000), (500 * KIB, 0)):
        machine("sys/fs/cgroup/memory.max", limit)
        machine("sys/fs/cgroup/memory.current", 1000 * KIB)
        assert memory.available_bytes() == expected * KIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    machine("sys/fs/cgroup/memory.max", "max")
    assert memory.available_bytes() == 1000 * KIB, "each process of a machine its share"


def test_files_that_are_only_kept_make_room(machine):
    """As after reading a model's weights."""
    machine("sys/fs/cgroup/memory.max", 16_000 * KIB)
    machine("sys/fs/cgroup/memory.current", 15_000 * KIB)
    machine("sys/fs/cgroup/memory.stat", f"anon 1\ninactive_file {12_000 * KIB}\nactive_file 7")
    assert memory.available_bytes() == 13_000 * KIB


def test_groups_within_groups_and_those_of_older_systems(machine):
    machine("proc/self/cgroup", "5:cpu,memory:/old\n4:cpu:/none\n0::/job/step")
    machine("sys/fs/cgroup/job/step/memory.max", 9000 * KIB)
    machine("sys/fs/cgroup/job/step/memory.current", 5000 * KIB)
    assert memory.available_bytes() == 4000 * KIB
    machine("sys/fs/cgroup/memory/old/memory.limit_in_bytes", 4000 * KIB)
    machine("sys/fs/cgroup/memory/old/memory.usage_in_bytes", 3000 * KIB)
    machine("sys/fs/cgroup/memory/old/memory.stat", f"total_inactive_file {500 * KIB}")
    assert memory.available_bytes() == 1500 * KIB
