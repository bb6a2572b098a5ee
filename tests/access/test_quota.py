"""Limits of an identity."""

from __future__ import annotations

import pytest

from server.access.identities import EVERYONE, Identity
from server.access.quota import LimitError, Quota

LIMITED = Identity("alice", requests_in_flight=2, tokens_per_minute=600)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(quota: Quota, identity: Identity = LIMITED) -> LimitError:
    with pytest.raises(LimitError) as caught:
        quota.check(identity)
    return caught.value


def test_requests_in_flight():
    quota = Quota()
    quota.in_flight = 1
    quota.check(LIMITED)
    quota.in_flight = 2
    error = refused(quota)
    assert (error.reason, error.limit, error.retry_seconds) == ("REQUESTS_IN_FLIGHT", 2, None)
    quota.check(EVERYONE)


def test_claims_of_the_kv_cache_add_up_to_the_limit():
    quota, identity = Quota(), Identity("alice", kv_tokens=100)
    quota.claim(identity, "a", 60)
    quota.claim(identity, "b", 40)
    with pytest.raises(LimitError, match=r"claim 100 of at most 100 tokens .* claims 1; wait") as caught:
        quota.claim(identity, "c", 1)
    assert (caught.value.reason, caught.value.limit, caught.value.retry_seconds) == ("KV_TOKENS", 100, None)
    assert quota.claims == {"a": 60, "b": 40}
    quota.claim(EVERYONE, "c", 10**9)


def test_tokens_fill_up_with_time_to_one_minutes_worth():
    clock = Clock()
    quota = Quota(clock)
    quota.check(LIMITED)
    quota.spend(599)
    quota.check(LIMITED)
    quota.spend(1)
    error = refused(quota)
    assert (error.reason, error.limit) == ("TOKENS_PER_MINUTE", 600)
    assert error.retry_seconds == pytest.approx(0.1)  # 10 tokens a second
    clock.now = 0.11
    quota.check(LIMITED)
    clock.now = 1000.0  # 10,000 tokens' time
    quota.check(LIMITED)
    quota.spend(600)
    refused(quota)


def test_a_long_output_is_a_debt_that_later_requests_wait_for():
    clock = Clock()
    quota = Quota(clock)
    quota.check(LIMITED)
    clock.now = 100.0  # an allowance that is full does not grow
    quota.spend(1800)
    assert refused(quota).retry_seconds == pytest.approx(120.1)
    clock.now = 220.2
    quota.check(LIMITED)


def test_a_new_limit_counts_from_its_beginning():
    quota = Quota(Clock())
    quota.check(EVERYONE)
    quota.spend(10**9)
    quota.check(LIMITED)


@pytest.mark.parametrize(("rate", "minutes"), [(600, 10), (60, 7)])
def test_on_average_the_limit_holds(rate, minutes):
    """A client that asks whenever it may, 50 tokens each, gets a minute's worth and then its rate."""
    clock, spent = Clock(), 0
    quota, identity = Quota(clock), Identity("x", tokens_per_minute=rate)
    for _ in range(minutes * 60 * 10):
        clock.now += 0.1
        try:
            quota.check(identity)
        except LimitError:
            continue
        quota.spend(50)
        spent += 50
    allowed = rate * (minutes + 1)
    assert allowed - 50 <= spent <= allowed + 50  # one request's tokens to either side
