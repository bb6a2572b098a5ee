"""Memory that steps free and take again costs no page faults."""

import subprocess
import sys

import pytest
import torch

from server.engine import encoder_build
from server.settings import Settings
from tests.encoders.zoo import save_encoder

# First as glibc begins (malloc.h): later it moves its thresholds, depending on what is freed when.
PROGRAM = """
import ctypes, resource, sys, torch
from server.engine.freed_memory import keep_freed_memory
mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
if mallopt is None:
    print("none")
    raise SystemExit
assert mallopt(-3, 128 << 10) and mallopt(-1, 128 << 10)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    tensors = [torch.ones(3 << 18) for _ in range(8)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_tensors_of_a_step_are_taken_from_what_the_last_one_freed():
    kept = faults("kept")
    if kept == "none":
        pytest.skip("this C library has no mallopt")
    # 20 steps of 24 MiB, which are 122,880 pages of 4 KiB; the bounds leave room for larger ones.
    assert int(kept) < 1000
    assert int(faults("given back")) > 5000


def test_an_encoders_engine_keeps_it(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(encoder_build, "keep_freed_memory", lambda: kept.append(True))
    settings = Settings(device="cpu", threads=torch.get_num_threads())
    encoder_build.build_encoder(settings, save_encoder("bert", tmp_path / "bert"), lambda *_: None)
    assert kept == [True]
