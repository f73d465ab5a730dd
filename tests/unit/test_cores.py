"""Cores are those that a process may run on, and no more than the quotas of its control groups pay for."""

import os

import pytest

from flashmoe_numba.processes import cores
from flashmoe_numba.processes.cores import count_cores, quotas

V2 = "cgroup2 cgroup2 rw,nsdelegate"
V1 = "cgroup cgroup rw,cpu,cpuacct"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Write a process's view of its groups: (its group's line, mount's root and kind, {file: text})."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def write(line, root, kind, files):
        proc, mount = tmp_path / "proc", tmp_path / "cgroup"
        proc.mkdir()
        (proc / "cgroup").write_text(f"3:memory:/other\n{line}\n")
        mounts = f"20 1 0:5 / /proc rw shared:3 - proc proc rw\n31 20 0:28 {root} {mount} rw shared:9 - {kind}\n"
        (proc / "mountinfo").write_text(mounts + "32 20 0:9 / /none rw - cgroup cgroup rw,memory\n")
        for name, text in files.items():
            (mount / name).parent.mkdir(parents=True, exist_ok=True)
            (mount / name).write_text(text)
        return proc

    return write


@pytest.mark.parametrize(("files", "expected"), [
    ({"a/b/cpu.max": "300000 100000\n"}, 3),
    ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),  # of a group around it
    ({"a/b/cpu.max": "600000 100000\n", "a/cpu.max": "550000 100000\n", "cpu.max": "700000 100000"}, 5),
    ({"a/b/cpu.max": "150000 100000\n"}, 1),  # 2 would stand still for a quarter of the time
    ({"a/b/cpu.max": "5000 100000\n"}, 1),
    ({"a/b/cpu.max": "10000000 100000\n"}, 8),
    ({"a/b/cpu.max": "max 100000\n"}, 8),
    ({"a/b/cpu.max": "nonsense\n", "a/cpu.max": ""}, 8),
    ({"a/other/cpu.max": "100000 100000\n"}, 8),  # of a neighbour
    ({}, 8),
])  # fmt: skip
def test_the_smallest_quota_of_v2_counts(tree, files, expected):
    assert count_cores(tree("0::/a/b", "/", V2, files)) == expected


@pytest.mark.parametrize(("quota", "period", "expected"), [("250000", "50000", 5), ("-1", "100000", 8)])
def test_quotas_of_v1(tree, quota, period, expected):
    files = {"a/cpu.cfs_quota_us": f"{quota}\n", "a/cpu.cfs_period_us": f"{period}\n"}
    assert count_cores(tree("4:cpu,cpuacct:/a", "/", V1, files)) == expected


@pytest.mark.parametrize(("line", "root"), [
    ("0::/docker/17", "/docker/17"),  # the container's own group is mounted
    ("0::/docker/17/a", "/docker/17"),
    ("0::/", "/"),  # a name space of groups
    ("0::/docker/17", "/pod/3"),  # of another name
])  # fmt: skip
def test_a_container_sees_its_own_quota(tree, line, root):
    assert list(quotas(tree(line, root, V2, {"cpu.max": "400000 100000"}))) == [4]


def test_without_control_groups_all_cores_count(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6}, raising=False)
    assert count_cores(tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores(tmp_path) == 1


def test_layers_and_jobs_count_so(tree, monkeypatch):
    proc = tree("0::/a", "/", V2, {"a/cpu.max": "400000 100000"})
    monkeypatch.setattr(count_cores, "__defaults__", (proc,))
    assert [cores.default_processors(ranks) for ranks in (1, 2, 3, 9)] == [4, 2, 1, 1]
    assert cores.count_cores() == 4
