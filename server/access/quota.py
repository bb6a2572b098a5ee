"""An identity's requests in flight and its use, against its limits."""

from __future__ import annotations

import time
from collections.abc import Callable

from server.access.identities import Identity

_MINUTE = 60.0


class LimitError(Exception):
    """A limit of an identity is reached; the message is a sentence.

    Attributes:
        reason: a fixed name of the limit, upper case.
        limit: the limit.
        retry_seconds: when to try again; ``None`` where that depends on other requests' ends.
    """

    def __init__(self, sentence: str, reason: str, limit: int, retry_seconds: float | None) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.limit = limit
        self.retry_seconds = retry_seconds


class Quota:
    """One identity's requests in flight, what they claim of the KV cache, and its allowance of tokens.

    The allowance fills up by ``tokens_per_minute`` a minute, to one minute's worth. A request may begin while
    some is left, and takes from it as its tokens are computed, below nothing too: so requests are never cut
    off, outputs of any length are possible, and on average the limit holds.

    Args:
        clock: in seconds; of tests.

    Attributes:
        in_flight: requests.
        claims: tokens of the KV cache that they claim, by request id.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.in_flight = 0
        self.claims: dict[str, int] = {}
        self._rate: int | None = None
        self._spent = 0.0  # of the allowance
        self._when = clock()

    def check(self, identity: Identity) -> None:
        """Whether one more request may begin.

        Raises:
            LimitError: it may not.
        """
        most = identity.requests_in_flight
        if most is not None and self.in_flight >= most:
            raise LimitError(
                f"{identity.name} has {self.in_flight} of at most {most} requests in flight; wait for one "
                "to end",
                "REQUESTS_IN_FLIGHT",
                most,
                None,
            )
        self._refill()
        rate = self._rate = identity.tokens_per_minute
        if rate is not None and self._spent >= rate:
            # Until one token is left.
            seconds = (self._spent - rate + 1) * _MINUTE / rate
            raise LimitError(
                f"{identity.name} has used its {rate} tokens per minute; try again in about {seconds:.1f} s",
                "TOKENS_PER_MINUTE",
                rate,
                seconds,
            )

    def claim(self, identity: Identity, request_id: str, tokens: int) -> None:
        """Enters what a request in flight claims of the KV cache.

        Raises:
            LimitError: together with the others it would be too much.
        """
        most = identity.kv_tokens
        if most is not None and (claimed := sum(self.claims.values())) + tokens > most:
            raise LimitError(
                f"{identity.name}'s requests in flight claim {claimed} of at most {most} tokens of the KV "
                f"cache, and this one claims {tokens}; wait for one to end, or lower max_tokens or n",
                "KV_TOKENS",
                most,
                None,
            )
        self.claims[request_id] = tokens

    def spend(self, tokens: int) -> None:
        """Takes tokens of a prompt or an output from the allowance."""
        if self._rate is not None:
            self._refill()
            self._spent += tokens

    def _refill(self) -> None:
        now = self._clock()
        filled = 0.0 if self._rate is None else (now - self._when) * self._rate / _MINUTE
        self._spent = max(0.0, self._spent - filled)
        self._when = now
