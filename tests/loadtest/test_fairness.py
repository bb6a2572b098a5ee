"""What requests wait for beside long prompts, on a small random model: every kind is measured."""

import asyncio
import io
import math

import pytest
from rich.console import Console

from loadtest.deployment import FULL
from loadtest.load import fairness
from longspan import LongspanError
from tests.loadtest.within import within
from tests.models_zoo import CONTEXT

BESIDE = ("nothing", "1 long", "4 long")


@pytest.fixture(scope="module")
def address(tiny_settings):
    with within(FULL, **tiny_settings, prefix_cache=False, max_context=CONTEXT) as running:
        yield running


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    """In no time no token of a stream comes, as in the usual time from a slow server."""
    for pause, seconds in (("_PAUSE", 0.02), ("_QUIET", 0), ("_WARM", 0.02)):
        monkeypatch.setattr(fairness, pause, seconds)
    monkeypatch.setattr(fairness, "SHORT", (4, 8))


def test_every_kind_is_measured(address):
    found = asyncio.run(fairness.measure(address, 2, fairness.LONG))
    assert {key: len(values) for key, values in found.short.items()} == {
        (beside, tokens): 2 for beside in BESIDE for tokens in (4, 8)
    }
    assert (len(found.after_quiet), set(found.long), set(found.gaps)) == (
        2,
        {"nothing", "a stream"},
        {"nothing", "a long prompt"},
    )
    every = [*found.short.values(), found.after_quiet, *found.long.values(), *found.gaps.values()]
    assert all(values and all(0 < value < math.inf for value in values) for values in every)
    told = io.StringIO()
    Console(file=told, width=120).print(fairness.table(found))
    assert told.getvalue().count("beside") == 6 + 4
    assert "after a quiet second" in told.getvalue()


def test_a_failed_long_prompt_fails_the_measurement(address, monkeypatch):
    """Beside nothing at all the others would look fast."""
    first_token = fairness.Requests.first_token
    long = 0

    async def failing(self, tokens):
        nonlocal long
        long += tokens > 8
        if long > 4:  # by itself, and beside a stream
            raise LongspanError("lost")
        return await first_token(self, tokens)

    monkeypatch.setattr(fairness.Requests, "first_token", failing)

    with pytest.raises(LongspanError, match="lost"):
        asyncio.run(fairness.measure(address, 1, 100))
