"""Which replica gets a call: the policies of deploy/envoy/envoy.yaml and round robin, by Envoy's rules."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
from array import array
from collections.abc import Callable, Sequence

_RING = 1024  # Envoy's minimum_ring_size
_BALANCE = 150  # hash_balance_factor
_BEGINNING = 64  # tokens of a prompt that its affinity is hashed from, see longspan.affinity


class Router:
    """Chooses a replica for each prompt, and counts the calls that each has.

    Args:
        policy: of ``POLICIES``.
        replicas: how many.
        seed: of what is drawn.

    Attributes:
        active: calls under way, by replica.
    """

    def __init__(self, policy: str, replicas: int, seed: int = 0) -> None:
        self.active = [0] * replicas
        self._total = 0
        self._choose = POLICIES[policy](self, random.Random(seed))

    def begin(self, prompt: Sequence[int]) -> int:
        """The replica that a call goes to, which has it until ``end``."""
        chosen = self._choose(prompt)
        self.active[chosen] += 1
        self._total += 1
        return chosen

    def end(self, replica: int) -> None:
        """A call of this replica has ended."""
        self.active[replica] -= 1
        self._total -= 1

    def round_robin(self, rng: random.Random) -> Callable[[Sequence[int]], int]:
        """One after the other."""
        turns = itertools.cycle(range(len(self.active)))
        return lambda prompt: next(turns)

    def least_request(self, rng: random.Random) -> Callable[[Sequence[int]], int]:
        """The less busy of two drawn ones."""
        count = len(self.active)
        return lambda prompt: min(rng.randrange(count), rng.randrange(count), key=self.active.__getitem__)

    def affinity(self, rng: random.Random) -> Callable[[Sequence[int]], int]:
        """By a ring hash of its beginning; where that replica has 1.5 times the mean, another one."""
        count = len(self.active)
        each = -(-_RING // count)
        ring = sorted((_hash(f"{host}_{i}".encode()), host) for host in range(count) for i in range(each))

        def choose(prompt: Sequence[int]) -> int:
            hashed = _hash(array("I", prompt[:_BEGINNING]).tobytes())
            host = ring[bisect.bisect_left(ring, (hashed, 0)) % len(ring)][1]
            slots = max(1, -(-(((self._total + 1) * _BALANCE + 99) // 100) // count))
            others = random.Random(hashed)
            while self.active[host] > slots:  # not all are: the mean is below
                host = others.randrange(count)
            return host

        return choose


POLICIES: dict[str, Callable[[Router, random.Random], Callable[[Sequence[int]], int]]] = {
    "round robin": Router.round_robin,
    "least request": Router.least_request,
    "affinity": Router.affinity,
}


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
