import psutil
import pytest

from server.models.memory import _cgroup_bytes, available_bytes


def test_no_more_than_the_machine_has():
    assert 1 << 20 < available_bytes("cpu") <= psutil.virtual_memory().total


def write(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(str(value))


@pytest.mark.parametrize("path", ["/", "/outside/this/container", "/inner"])
def test_version_2_counts_inactive_page_cache_as_free(path, tmp_path):
    write(tmp_path, memory__max=1000, memory__current=700, memory__stat="anon 400\ninactive_file 250\n")
    (tmp_path / "groups").write_text(f"0::{path}\n")
    assert _cgroup_bytes(tmp_path / "groups", tmp_path) == [550]


def test_the_groups_above_count_too(tmp_path):
    write(tmp_path / "a" / "b", memory__max="max", memory__current=100, memory__stat="")
    write(tmp_path / "a", memory__max=500, memory__current=700, memory__stat="")
    (tmp_path / "groups").write_text("0::/a/b\n")
    assert _cgroup_bytes(tmp_path / "groups", tmp_path) == [0]


def test_version_1(tmp_path):
    group = tmp_path / "memory" / "docker"
    write(
        group,
        memory__limit_in_bytes=900,
        memory__usage_in_bytes=300,
        memory__stat="inactive_file 1\ntotal_inactive_file 50\n",
    )
    (tmp_path / "groups").write_text("5:cpu,cpuacct:/x\n4:memory:/docker\n0::/\n")
    assert _cgroup_bytes(tmp_path / "groups", tmp_path) == [650]


def test_no_control_groups(tmp_path):
    assert _cgroup_bytes(tmp_path / "none", tmp_path) == []
