"""A server that wants TLS and tokens, as operators and clients meet it."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from longspan import BusyError, Client, InvalidRequestError, UnauthenticatedError
from tests.authority import Authority
from tests.command import longspan
from tests.e2e.here import Here, serving


class Secured(NamedTuple):
    """A server, how to reach it, and the tokens of its identities."""

    server: Here
    root: Path
    identities: Path
    tokens: dict[str, str]

    def client(self, token: str) -> Client:
        return Client("localhost", self.server.port, ca=self.root, token=token, timeout=60)


def make_token(name: str, file: Path) -> str:
    made = longspan("token", name, "--identities", str(file))
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


@pytest.fixture(scope="module")
def secured(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("access")
    authority, identities = Authority(folder / "authority"), folder / "identities.toml"
    issued = authority.issue("localhost")
    tokens = {name: make_token(name, identities) for name in ("alice", "bob", "dora")}
    with identities.open("a") as file:
        file.write("kv_tokens = 8000\n")  # of dora, the last one
    settings = {"tls_certificate": issued.certificate, "tls_key": issued.key, "identities": identities}
    with serving(**settings) as server:
        yield Secured(server, authority.root, identities, tokens)


def prompt(tokens: int, rng: random.Random) -> list[int]:
    return [rng.randrange(1000, 40_000) for _ in range(tokens)]


def test_the_prefix_cache_finds_prompts_of_the_same_identity_only(secured):
    """By count. The victim's prompt ends in a PIN; the attacker tries all that begin like it."""
    page, rng = 16, random.Random(1)
    secret, guesses = prompt(3 * page, rng), [prompt(page, rng) for _ in range(10)]
    with secured.client(secured.tokens["alice"]) as alice, secured.client(secured.tokens["bob"]) as bob:

        def cached(client: Client, ids: list[int]) -> int:
            return client.generate([*ids, 1000], max_tokens=1).usage.cached_prompt_tokens

        pin = guesses[7]
        assert cached(alice, secret + pin) == 0
        assert [cached(bob, secret + guess) for guess in guesses] == [0] + 9 * [3 * page], "its own guesses"
        assert cached(bob, [*secret[:page], *pin]) == page, "and no more of it than that"
        assert cached(alice, secret + pin) == 4 * page


def test_nor_does_the_time_to_the_first_token_tell(secured):
    """A hit leaves 1/12 of the prompt to compute. A busy machine makes any of these slower, so the best of
    three counts; half of a whole prefill is far from both.
    """
    rng, seconds = random.Random(2), {"first": [], "other": [], "again": []}
    with secured.client(secured.tokens["alice"]) as alice, secured.client(secured.tokens["bob"]) as bob:
        for _ in range(3):
            ids = prompt(16 * 12 + 1, rng)
            for name, client in (("first", alice), ("other", bob), ("again", alice)):
                begun = time.monotonic()
                next(iter(client.stream(ids, max_tokens=1)))
                seconds[name].append(time.monotonic() - begun)
    best = {name: min(values) for name, values in seconds.items()}
    assert best["again"] < best["first"] / 2 < best["other"], best


def test_the_kv_cache_that_one_identity_claims(secured):
    """7900 tokens take far more than the 5 seconds in which the claim of a stream that is left must end."""
    ids = prompt(100, random.Random(3))
    with secured.client(secured.tokens["dora"]) as dora, secured.client(secured.tokens["bob"]) as bob:
        stream = dora.stream(ids, max_tokens=7900, ignore_eos=True)
        deltas = iter(stream)
        next(deltas)
        with pytest.raises(BusyError, match=r"claim 8000 of at most 8000 .* this one claims 101") as busy:
            dora.generate(ids, max_tokens=1)
        assert busy.value.retry_after > 0
        bob.generate(ids, max_tokens=1)
        with pytest.raises(InvalidRequestError, match="claims 8001 tokens of the KV cache"):
            dora.generate(ids, max_tokens=7901)
        stream.close()
        end = time.monotonic() + 5
        while True:
            try:
                dora.generate(ids, max_tokens=1)
                break
            except BusyError:
                assert time.monotonic() < end
                time.sleep(0.05)


def test_a_token_counts_from_the_time_at_which_the_file_has_it(secured):
    before = secured.identities.read_text()
    with (
        secured.client("longspan_unknown") as stranger,
        pytest.raises(UnauthenticatedError, match="not known"),
    ):
        stranger.models()
    with secured.client(make_token("carol", secured.identities)) as carol:
        time.sleep(1.1)  # the file is looked at once a second
        assert carol.models() == [secured.server.name]
        secured.identities.write_text(before)
        time.sleep(1.1)
        with pytest.raises(UnauthenticatedError):
            carol.models()


def test_commands_by_the_environment(secured):
    environment = {
        "LONGSPAN_PORT": str(secured.server.port),
        "LONGSPAN_CA": str(secured.root),
        "LONGSPAN_TOKEN": secured.tokens["alice"],
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return longspan(*arguments, environment=environment)

    assert run("health").returncode == 0
    done = run("generate", "What is the capital of Japan?", "--chat", "--max-tokens", "10")
    assert (done.returncode, "Tokyo" in done.stdout) == (0, True), done.stderr
    load = ["load", "--concurrency", "2", "--requests", "4", "--no-metrics"]
    done = run(*load, "--prompt-tokens", "16", "--output-tokens", "4")
    assert "nothing was measured" not in done.stderr
    assert done.stdout.count("\n") > 1, done.stderr
    del environment["LONGSPAN_TOKEN"]
    assert run("health").returncode == 0, "probes have no token"
    done = run("generate", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "shows no token" in done.stderr


def test_nothing_secret_is_told(secured):
    with secured.client(secured.tokens["bob"]) as bob:
        bob.generate("hello", max_tokens=1)
        told = bob.server_info().settings
    assert (told["tls_key"], told["identities"]) == ("localhost.key", "identities.toml")
    assert not any(token in secured.server.log for token in secured.tokens.values())
