"""Long runs, for ``make stress``: nothing leaks, and no client notices the others."""

import os
import random

import psutil
import pytest

from tests.e2e.server import Server
from tests.models_zoo import save_tiny

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

CANCELLATIONS = int(os.environ.get("LONGSPAN_STRESS_CANCELLATIONS", "10000"))


async def test_cancellations_at_random_tokens_leak_nothing(tmp_path):
    """Streams are left after a random number of tokens, some at once; memory and descriptors stay flat."""
    rng = random.Random(0)
    with Server("--model", save_tiny("llama", tmp_path / "llama"), "--max-running", "32") as server:
        processes = [psutil.Process(server.process.pid), psutil.Process(server.engine_pid)]
        async with server.aclient() as client:
            expected = (await client.generate("unchanged", max_tokens=30, temperature=0)).token_ids

            async def round_of(count):
                await server.cancel_many(count, rng)
                server.wait_idle(seconds=5)
                return [(process.memory_info().rss, process.num_fds()) for process in processes]

            await round_of(CANCELLATIONS // 2)
            middle = await round_of(CANCELLATIONS // 4)
            end = await round_of(CANCELLATIONS // 4)
            again = (await client.generate("unchanged", max_tokens=30, temperature=0)).token_ids
        assert list(again) == list(expected)
        for (memory, descriptors), (memory_before, descriptors_before) in zip(end, middle, strict=True):
            grown = (memory - memory_before) / 2**20 / (CANCELLATIONS / 4 / 10_000)
            assert grown < 16, f"{grown:.1f} MiB more per 10,000 cancellations"
            assert descriptors <= descriptors_before + 4
