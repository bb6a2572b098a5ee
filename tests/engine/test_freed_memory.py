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
import ctypes, resource, torch
from server.engine.freed_memory import keep_freed_memory
mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
if mallopt is None:
    print("none")
    raise SystemExit
assert mallopt(-3, 128 << 10) and mallopt(-1, 128 << 10)
def step():
    tensors = [torch.ones(3 << 18) for _ in range(8)]
def faults():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
assert keep_freed_memory()
print(given_back, faults())
"""


def test_tensors_of_a_step_are_taken_from_what_the_last_one_freed():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    if done.stdout == "none\n":
        pytest.skip("this C library has no mallopt")
    given_back, kept = map(int, done.stdout.split())
    # 20 steps of 24 MiB, which are 122,880 pages of 4 KiB; the bounds leave room for larger ones.
    assert given_back > 5000
    assert kept < 1000


def test_an_encoders_engine_keeps_it(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(encoder_build, "keep_freed_memory", lambda: kept.append(True))
    settings = Settings(device="cpu", threads=torch.get_num_threads())
    encoder_build.build_encoder(settings, save_encoder("bert", tmp_path / "bert"), lambda *_: None)
    assert kept == [True]
