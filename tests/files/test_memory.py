"""Free memory is the least of what the machine, the control groups around the process and its own limits leave."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from secateur.files import memory
from secateur.files.memory import free_memory
from support.small_runs import in_child

GROUPS = Path("/sys/fs/cgroup/memory")
MIB = 2**20


def _machine(root: Path, *, group: str, mount: str, files: dict[str, str]) -> Path:
    """A tree in which 10 GiB are available, with one line each in cgroup and mountinfo."""
    written = {
        "proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 10485760 kB\n",
        "proc/self/cgroup": f"11:cpu,cpuacct:/x\n{group}\n",
        "proc/self/mountinfo": f"22 1 0:5 / /proc rw - proc proc rw\n{mount}\n",
        **files,
    }
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _v2(root: Path, files: dict[str, str], *, group: str = "0::/a/b", top: str = "/") -> Path:
    mount = f"30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
    return _machine(
        root, group=group, mount=mount, files={f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    )


STAT = "anon 5\ninactive_file 300\nactive_file 40\nfile 99999\n"


def test_without_a_limit_it_is_what_the_machine_has_available(tmp_path: Path) -> None:
    files = {"a/b/memory.max": "max\n", "a/b/memory.high": "max", "a/b/memory.current": "77", "a/b/memory.stat": STAT}
    assert free_memory(_v2(tmp_path, files)) == 10 * 2**30


def test_a_limit_of_version_2_counts_without_the_file_cache(tmp_path: Path) -> None:
    files = {"a/b/memory.max": "5000\n", "a/b/memory.current": "1000\n", "a/b/memory.stat": STAT}
    assert free_memory(_v2(tmp_path, files)) == 5000 - 1000 + 340


def test_the_tightest_group_around_the_process_decides(tmp_path: Path) -> None:
    files = {"a/b/memory.max": "5000", "a/b/memory.current": "1000", "a/memory.max": "max", "a/memory.high": "1500"}
    files |= {"a/memory.current": "1100", "memory.max": "9000", "memory.current": "1"}
    assert free_memory(_v2(tmp_path, files)) == 400


def test_a_container_that_sees_its_own_part_of_the_tree_is_found_in_it(tmp_path: Path) -> None:
    files = {"memory.max": "6000", "memory.current": "1000"}
    assert free_memory(_v2(tmp_path / "1", files, group="0::/docker/7", top="/docker/7")) == 5000
    assert free_memory(_v2(tmp_path / "2", files, group="0::/", top="/../..")) == 5000
    _machine(
        tmp_path / "3", group="", mount="", files={"sys/fs/other/memory.max": "9", "sys/fs/other/memory.current": "1"}
    )
    assert free_memory(_v2(tmp_path / "3", files, group="0::/../other", top="/")) == 5000


def test_a_limit_of_version_1_is_read_where_its_controller_is_mounted(tmp_path: Path) -> None:
    mount = "35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory\n36 31 0:33 / /cg/cpu rw - cgroup cgroup rw,cpu"
    files = {f"cg/{name}/job/memory.limit_in_bytes": limit for name, limit in (("memory", "8000"), ("cpu", "1"))}
    files |= {f"cg/{name}/job/memory.usage_in_bytes": "3000" for name in ("memory", "cpu")}
    files["cg/memory/job/memory.stat"] = "inactive_file 9\ntotal_inactive_file 200\ntotal_active_file 30\n"
    files |= {"cg/memory/memory.limit_in_bytes": "9223372036854771712", "cg/memory/memory.usage_in_bytes": "3000"}
    assert free_memory(_machine(tmp_path, group="4:memory:/job", mount=mount, files=files)) == 8000 - 3000 + 230


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert free_memory(_v2(tmp_path, {"a/b/memory.max": "100", "a/b/memory.current": "200"})) == 0


@pytest.mark.parametrize("text", ["", "garbage", "4:memory", "-1", "0::/a/b\x00"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, text: str) -> None:
    files = {"a/b/memory.max": text, "a/b/memory.current": text}
    root = _v2(tmp_path, files, group=text)
    assert free_memory(root) == 10 * 2**30
    (root / "proc/self/mountinfo").write_text(text)
    assert free_memory(root) == 10 * 2**30


def test_without_linux_it_is_all_that_the_machine_has(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("limit", "line"), memory.PROCESS_LIMITS)
def test_a_limit_of_the_process_leaves_what_it_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, line: str
) -> None:
    root = _v2(tmp_path, {})
    (root / "proc/self/status").write_text(f"Name:\tpython\n{line}:\t 3 kB\n")
    limits = {limit: (8192, resource.RLIM_INFINITY)}
    nothing = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda name: limits.get(name, nothing))
    assert free_memory(root) == 8192 - 3 * 1024


def _within(group: str, limit: int) -> None:
    Path(group, "memory.limit_in_bytes").write_text(str(limit))
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    free = free_memory()
    Path("/".join((*Path(group).parts[:-1], "cgroup.procs"))).write_text(str(os.getpid()))
    assert 0 <= free <= limit, free


@pytest.mark.process
def test_a_real_limit_is_seen() -> None:
    group = GROUPS / f"secateur-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups of version 1 cannot be made here: {error}")
    try:
        assert in_child(_within, str(group), 512 * MIB) == 0
    finally:
        group.rmdir()
