"""Other use of the processors: over made-up ``/proc`` folders, and over this machine's own."""

import os
import subprocess
import sys

import pytest

from loadtest.measuring import weather
from loadtest.measuring.processes import TICKS, name, processes, tree
from loadtest.measuring.types import Weather
from loadtest.measuring.weather import Observed, Watch, disturbance

SPIN = "import time\nend = time.monotonic() + {0}\nwhile time.monotonic() < end: pass"


class Proc:
    """A ``/proc`` of two processors, and a third that is not this process's, where nothing happened yet."""

    def __init__(self, root):
        self.root, self.now = root / "proc", 0.0
        self.cgroups = root / "cgroup"
        (self.root / "self").mkdir(parents=True)
        self.cpus = {0: [5] * 10, 1: [7] * 10, 2: [9] * 10}
        self.processes = {}
        self.add(1, 0, "init")
        self.add(os.getpid(), 1, "measures")
        self.cgroup("0::/\n")
        self.write()

    def add(self, pid, parent, words, started=0, cpu=0):
        self.processes[pid] = [parent, [0, 0, 0, 0], started, cpu, words]

    def run(self, pid, ticks, cpu=0, kind=0):
        """So much time of a process; kinds are user, system, and those of children that it has waited for."""
        self.processes[pid][1][kind] += ticks
        if kind < 2:
            self.cpus[cpu][0 if kind == 0 else 2] += ticks

    def end(self, pid):
        """Its parent has waited for it."""
        parent, times, *_ = self.processes.pop(pid)
        self.processes[parent][1][2] += times[0] + times[2]
        self.processes[parent][1][3] += times[1] + times[3]

    def cgroup(self, text):
        (self.root / "self" / "cgroup").write_text(text)

    def write(self):
        lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
        lines += [f"cpu{cpu} {' '.join(map(str, numbers))}" for cpu, numbers in self.cpus.items()]
        (self.root / "stat").write_text("\n".join(lines) + "\nintr 1 2 3\n")
        for folder in self.root.iterdir():
            if folder.name.isdecimal() and int(folder.name) not in self.processes:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
        for pid, (parent, times, started, cpu, words) in self.processes.items():
            (self.root / str(pid)).mkdir(exist_ok=True)
            after = ["S", parent, *[0] * 9, *times, 0, 0, 1, 0, started, *[0] * 16, cpu, 0, 0]
            text = f"{pid} (a (b) c) {' '.join(map(str, after))}\n"
            (self.root / str(pid) / "stat").write_text(text)
            (self.root / str(pid) / "cmdline").write_text("\0".join(words.split()) + "\0")

    def watch(self, pids=(), idle=()):
        return Watch(pids, idle, root=self.root, cgroups=self.cgroups, cores=(0, 1), clock=lambda: self.now)

    def pass_time(self, seconds):
        self.now += seconds
        self.write()


@pytest.fixture
def proc(tmp_path):
    return Proc(tmp_path)


def test_time_of_this_process_and_of_its_targets_is_not_foreign(proc):
    me = os.getpid()
    proc.add(50, me, "server")
    proc.add(51, 50, "engine")
    proc.add(60, 1, "elsewhere")  # started by another process, and a target
    proc.write()
    watch = proc.watch(pids=(60,))
    for pid in (me, 50, 51, 60):
        proc.run(pid, 20)
    proc.add(52, 51, "worker", started=7)  # comes and goes in between
    proc.run(52, 30, cpu=1)
    proc.end(52)
    proc.run(51, 10, kind=1)
    proc.pass_time(1.0)
    found = watch.so_far()
    assert found.weather == Weather()
    assert found.seconds == 2.0
    assert found.busiest == ""
    assert disturbance(found) == ""


def test_time_of_others_is_foreign_and_the_busiest_of_them_is_named(proc):
    me = os.getpid()
    proc.add(50, me, "server")
    proc.add(51, me, "other-server")  # a child, but without a part in this measurement
    proc.add(70, 1, "/usr/bin/python /home/x/train.py --token=secret")
    proc.add(80, 1, "far", cpu=2)
    proc.write()
    watch = proc.watch(pids=(50,), idle=(51,))
    proc.run(50, 100)
    proc.run(51, 10, cpu=1)
    proc.run(70, 30, cpu=1)
    proc.run(80, 100, cpu=2)  # on a processor that this process may not use
    proc.add(71, 1, "make -j8", started=9)
    proc.cpus[1][0] += 25
    proc.run(71, 25, kind=2)  # compilers that it has waited for
    proc.pass_time(1.0)
    found = watch.so_far()
    assert found.weather.foreign == pytest.approx(65 / TICKS / 2)
    assert found.busiest == "PID 70 python train.py"
    assert "secret" not in disturbance(found)
    assert disturbance(found).startswith("other processes used 32% of the processor time, most of all PID 70")


def test_stolen_time_and_quotas(proc):
    for version, text in (
        ("0::/a/b\n", "throttled_usec"),
        ("3:cpuset:/x\n1:cpuacct,cpu:/a/b\n", "throttled_time"),
    ):
        proc.cgroup(version)
        folder = proc.cgroups / ("" if text.endswith("usec") else "cpuacct,cpu") / "a"
        (folder / "b").mkdir(parents=True)
        unit = 1_000_000 if text.endswith("usec") else 1_000_000_000
        (folder / "b" / "cpu.stat").write_text(f"nr_periods 3\n{text} {unit}\n")
        (folder / "cpu.stat").write_text(f"{text} 0\n")
        watch = proc.watch()
        proc.cpus[0][7] += 20
        (folder / "cpu.stat").write_text(f"{text} {unit // 2}\n")  # of a group around this one
        proc.pass_time(1.0)
        found = watch.so_far().weather
        assert found == Weather(stolen=0.1, foreign=0.0, throttled=0.25)
        words = disturbance(Observed(found, 2.0))
        assert words == (
            "the hypervisor gave 10% of the processor time to others; "
            "a CPU quota took 25% of the processor time away"
        )


def test_few_ticks_are_not_taken_for_a_disturbance():
    some = Weather(foreign=0.2)
    assert disturbance(Observed(some, 2.0))
    assert not disturbance(Observed(some, 5 / TICKS / 0.2))
    assert disturbance(Observed(some, 7 / TICKS / 0.2))
    assert not disturbance(Observed(Weather(0.03, 0.03, 0.03), 2.0))
    assert not disturbance(Observed(Weather(float("nan"), float("nan"), float("nan")), float("nan")))


def test_a_process_id_that_was_given_again_is_another_process(proc):
    me = os.getpid()
    proc.add(50, me, "server")
    proc.run(50, 1000)
    proc.write()
    watch = proc.watch()
    proc.end(50)
    proc.add(50, 1, "stranger", started=99)
    proc.run(50, 60)
    proc.pass_time(1.0)
    found = watch.so_far()
    assert found.weather.foreign == pytest.approx(0.3)
    assert found.busiest == "PID 50 stranger"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("/usr/bin/python3", "-m", "http.server", "--key=secret"), "python3 -m http.server"),
        (("/opt/bin/python", "/home/me/train.py", "--key", "secret"), "python train.py"),
        (("bash", "-c", "echo secret"), "bash"),
        (("env", "KEY=secret", "python"), "env"),
        (("x" * 99,), "x" * 40),
    ],
)
def test_a_process_is_named_without_secret_arguments(tmp_path, words, told):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_bytes("\0".join([*words, ""]).encode())
    assert name(7, tmp_path) == told
    assert name(8, tmp_path) == ""


def test_an_orphan_of_ours_stays_ours(proc):
    me = os.getpid()
    proc.add(50, me, "server")
    proc.add(51, 50, "engine")
    proc.write()
    watch = proc.watch()
    proc.run(51, 80)
    proc.processes[51][0] = 1
    proc.pass_time(1.0)
    assert watch.so_far().weather.foreign == 0.0


def test_a_system_that_does_not_tell_is_no_disturbance_and_no_quiet(monkeypatch):
    monkeypatch.setattr(weather, "known", lambda: False)
    found = weather.observe()()
    assert found.weather.foreign != found.weather.foreign
    assert disturbance(found) == ""


@pytest.mark.skipif(not weather.known(), reason=weather.UNKNOWN)
def test_on_this_machine_a_busy_process_counts_unless_it_is_ours():
    """Shares of a machine that may have other work too are only bounded."""
    with subprocess.Popen([sys.executable, "-c", SPIN.format(60)]) as child:
        try:
            table = processes(weather._PROC)
            assert child.pid in tree(table, {os.getpid()})
            assert name(child.pid, weather._PROC).startswith("python")
            ours, foreign = weather.observe(), weather.observe(idle=(child.pid,))
            before = os.times()
            subprocess.run([sys.executable, "-c", SPIN.format(0.3)], check=True)
            took = sum(processes(weather._PROC)[child.pid][1:2]) - table[child.pid].ticks
            mine, theirs = ours(), foreign()
            assert os.times().children_user > before.children_user
            # The child's time is the difference between the two.
            gap = (theirs.weather.foreign - mine.weather.foreign) * theirs.seconds * TICKS
            assert took > 0
            assert gap > 0.5 * took
        finally:
            child.kill()
