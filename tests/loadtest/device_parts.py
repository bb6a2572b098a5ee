"""Parts that measure nothing, for the process that runs them. Imports little, so that it starts at once."""

import os
import signal
import subprocess
import sys
import time


def _figures(folder):
    yield "one", 1.0
    yield "said", "a text"
    print("this must not get into the result")


def _broken(folder):
    yield "before", 2.0
    raise ValueError("the disk\nis full")


def _dying(folder):
    yield "last", 3.0
    os.kill(os.getpid(), signal.SIGKILL)


def _endless(folder):
    """Starts a process of its own, as a server is one, and notes both."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    yield "begun", 4.0
    time.sleep(600)


def _pid(folder):
    yield "pid", float(os.getpid())


def _other_pid(folder):
    yield "other_pid", float(os.getpid())


def parts():
    return {
        "figures": _figures,
        "broken": _broken,
        "dying": _dying,
        "endless": _endless,
        "pid": _pid,
        "other pid": _other_pid,
    }
