"""The file of identities: what is refused, and which call is whose."""

from __future__ import annotations

import base64
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from server.access import callers, watched
from server.access.callers import Callers, DeniedError
from server.access.identities import Identity, read_identities, token_hash
from server.errors import RefusedError

TOKEN, OTHER = "a token of alice", "another"
TWO = f"""
[alice]
token_sha256 = ["{token_hash(TOKEN)}", "{token_hash("her next one")}"]
requests_in_flight = 2
tokens_per_minute = 1000
kv_tokens = 500
max_priority = 3

[bob]
token_sha256 = ["{token_hash(OTHER)}"]
certificates = ["bob.example", "spiffe://x/bob"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "identities.toml"
    path.write_text(TWO)
    return path


def bearer(token: str) -> list[tuple[str, str]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {token}")]


def name(found: Callers, token: str) -> str:
    caller = found.by_token(bearer(token))
    assert caller is not None
    return caller.identity.name


def test_a_file_says_who_may_ask_and_how_much(file):
    alice, bob = read_identities(file)
    assert alice == Identity(
        "alice", (token_hash(TOKEN), token_hash("her next one")), (), 2, 1000, 500, max_priority=3
    )
    assert (bob.certificates, bob.requests_in_flight, bob.max_priority) == (
        ("bob.example", "spiffe://x/bob"),
        None,
        0,
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no identities; longspan token NAME makes the first"),
        ("a = 1", "'a' stands outside a table"),
        ("[a", "is not valid TOML"),
        ('["a b"]', "'a b' is no name"),
        ("[a]\ntoken = 'x'", r"\[a\] has no 'token'; it may have certificates, kv_events, kv_tokens"),
        ("[a]", "neither token_sha256 nor certificates"),
        ("[a]\ntoken_sha256 = 'x'", "token_sha256 is not a list of texts"),
        ("[a]\ntoken_sha256 = ['my secret']", "not 64 hexadecimal digits"),
        ("[a]\ncertificates = ['']", "certificates is not a list of texts"),
        ("[a]\ncertificates = ['x']\nrequests_in_flight = 0", "is not a whole number from 1 to"),
        (
            f"[a]\ncertificates = ['x']\ntokens_per_minute = {10**400}",
            "tokens_per_minute is not a whole number",
        ),
        ("[a]\ncertificates = ['x']\nkv_tokens = 1.5", "kv_tokens is not a whole number from 1 to"),
        (f"[a]\ntoken_sha256 = ['{token_hash('')}']", "the hash of an empty token"),
        ("a = " + "[" * 5000, "is not valid TOML"),
        ("[a]\ncertificates = ['x']\nmax_priority = true", "max_priority is not a whole number"),
        ("[a]\ncertificates = ['x']\nmetrics = 1", "metrics is neither true nor false"),
        ("[a]\ncertificates = ['x']\nkv_events = 'x'", "kv_events is neither true nor false"),
        (
            "[a]\ncertificates = ['x']\n[b]\ncertificates = ['x']",
            r"\[a\] and \[b\] have the same token or certificate",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_identity_at_fault(tmp_path, text, sentence):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(RefusedError, match=sentence) as caught:
        read_identities(path)
    assert "my secret" not in str(caught.value), "a token written in place of its hash must not be logged"


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="can't be read"):
        Callers(tmp_path / "gone")


def test_a_token_proves_its_identity(file):
    found = Callers(file)
    assert not found.open
    assert [name(found, token) for token in (TOKEN, "her next one", OTHER)] == ["alice", "alice", "bob"]
    assert found.by_token([("authorization", f"bearer  {TOKEN} ")]) is found.by_token(bearer(TOKEN))
    for headers, sentence in (
        ([], "shows no token"),
        (bearer("a token of alicf"), "not known here"),
        (bearer(""), "not known here"),
        (bearer(token_hash(TOKEN)), "not known here"),
        ([("authorization", f"Basic {TOKEN}")], "not of the form"),
        (bearer(TOKEN) + bearer(OTHER), "not of the form"),
    ):
        with pytest.raises(DeniedError, match=sentence) as caught:
            found.by_token(headers)
        assert "alice" not in str(caught.value)


def test_a_certificate_proves_the_identity_that_names_it(file):
    found = Callers(file, certificates=True)
    assert found.by_token([]) is None
    for connection in (
        {"x509_common_name": [b"bob.example"]},
        {"x509_common_name": [b"x"], "x509_subject_alternative_name": [b"a.example", b"spiffe://x/bob"]},
    ):
        assert found.by_certificate(connection) is found.by_token(bearer(OTHER))
    for connection, sentence in (
        ({"x509_common_name": [b"alice"]}, "'alice' belongs to no identity"),
        ({}, "shows no token"),
    ):
        with pytest.raises(DeniedError, match=sentence):
            found.by_certificate(connection)


def test_a_certificate_of_two_identities(tmp_path):
    """Its common name tells, and the order of the file does not."""
    file = tmp_path / "identities.toml"
    file.write_text("[low]\ncertificates = ['shared', 'low']\n[high]\ncertificates = ['high']\n")
    found = Callers(file, certificates=True)
    connection = {"x509_common_name": [b"high"], "x509_subject_alternative_name": [b"shared"]}
    assert found.by_certificate(connection).identity.name == "high"
    connection = {"x509_subject_alternative_name": [b"shared", b"low"]}
    assert found.by_certificate(connection).identity.name == "low"
    with pytest.raises(DeniedError, match="belongs to several identities"):
        found.by_certificate({"x509_subject_alternative_name": [b"shared", b"high"]})


def test_names_of_a_certificate_count_only_where_tls_checks_it(file):
    with pytest.raises(DeniedError):
        Callers(file).by_certificate({"x509_common_name": [b"bob.example"]})


def test_without_a_file_a_certificate_is_an_identity():
    found = Callers(certificates=True)
    assert found.by_token(bearer("any")) is None
    carol = found.by_certificate({"x509_common_name": [b"carol"], "x509_subject_alternative_name": [b"c"]})
    assert carol.identity == Identity("carol", max_priority=None)
    assert found.by_certificate({"x509_subject_alternative_name": [b"c"]}).identity.name == "c"
    with pytest.raises(DeniedError, match="neither a common nor an alternative name"):
        found.by_certificate({})
    for unsafe in (b"a\nrequest r of b: OK", b"a" * 65, b"\xff"):
        with pytest.raises(DeniedError, match="none that an identity may have") as caught:
            found.by_certificate({"x509_common_name": [unsafe]})
        assert str(caught.value).isprintable()


def test_without_either_every_call_is_everyones():
    found = Callers()
    assert found.open
    assert found.by_token([]) is found.by_token(bearer("any")) is found.everyone
    assert (found.everyone.identity.name, found.everyone.salt) == ("", b"")


def test_a_changed_file_counts_from_the_next_look_on(file, caplog):
    found = Callers(file)
    alice = found.by_token(bearer(TOKEN))
    assert alice is not None
    file.write_text(f"[alice]\ntoken_sha256 = ['{token_hash('new')}']\nmax_priority = 9\n")
    assert name(found, TOKEN) == "alice", "the file is not looked at for every call"
    found.look()
    for revoked in (TOKEN, OTHER):
        with pytest.raises(DeniedError):
            found.by_token(bearer(revoked))
    assert found.by_token(bearer("new")) is alice, "what it has in flight is still its own"
    assert alice.identity.max_priority == 9
    file.write_text("[alice")
    with caplog.at_level(logging.ERROR):
        found.look()
        found.look()
    assert name(found, "new") == "alice"
    (record,) = caplog.records
    assert "the identities read before stay in force" in record.getMessage()


def test_a_file_that_is_saved_in_place_takes_no_identity_away(file, caplog):
    found = Callers(file)
    file.write_text("")
    found.look()
    assert [name(found, token) for token in (TOKEN, OTHER)] == ["alice", "bob"]
    assert "has no identities" in caplog.text
    file.write_text(TWO.replace(token_hash(TOKEN), token_hash("new")))
    found.look()
    with pytest.raises(DeniedError):
        found.by_token(bearer(TOKEN))
    assert name(found, "new") == "alice"


def test_a_file_that_could_not_be_read_once_is_read_again(file, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    found = Callers(file)
    file.write_text(TWO.replace(token_hash(TOKEN), token_hash("new")))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refuse)
        for _ in range(3):
            found.look()
        assert name(found, TOKEN) == "alice"
    (record,) = caplog.records
    assert "can't be read (Permission denied)" in record.getMessage(), "and told once"
    found.look()
    with pytest.raises(DeniedError):
        found.by_token(bearer(TOKEN))


def test_a_change_that_keeps_size_and_time_is_noticed(file):
    found, before = Callers(file), file.stat()
    file.write_text(TWO.replace(token_hash(TOKEN), token_hash("new")))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    found.look()
    with pytest.raises(DeniedError):
        found.by_token(bearer(TOKEN))


def test_idle_callers_that_the_file_does_not_name_are_forgotten(monkeypatch):
    monkeypatch.setattr(callers, "_MOST_CALLERS", 4)
    found = Callers(certificates=True)

    def connect(name: str) -> callers.Caller:
        return found.by_certificate({"x509_common_name": [name.encode()]})

    busy = connect("busy")
    busy.quota.in_flight = 1
    salt = connect("c0").salt
    for number in range(100):
        connect(f"c{number}")
    assert len(found._callers) <= 4
    assert connect("busy") is busy
    assert connect("c0").salt == salt


def test_each_identity_has_a_salt_of_its_own(file):
    def salts(found: Callers) -> list[bytes]:
        return [found.by_token(bearer(token)).salt for token in (TOKEN, OTHER)]

    one, again = salts(Callers(file)), salts(Callers(file))
    assert len({*one, *again, b""}) == 5, "nor can it be known outside the process"
    assert salts(Callers(file, share_prefixes=True)) == [b"", b""]


def test_metrics_are_read_with_a_token_of_an_identity_that_may(tmp_path):
    def basic(user: str, password: str) -> str:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    file = tmp_path / "identities.toml"
    file.write_text(f"{TWO}metrics = true\n")  # bob's
    may = Callers(file).may_read_metrics
    assert all(map(may, (f"Bearer {OTHER}", f"bearer {OTHER}", basic("bob", OTHER))))
    for wrong in (
        *("", "Bearer", f"Bearer {TOKEN}", basic("alice", TOKEN), basic("alice", OTHER), basic("", OTHER)),
        *(basic("bob", "x"), "Basic ???", "Basic /w==", f"Digest {OTHER}"),
    ):
        assert not may(wrong), wrong


def test_a_pipe_in_place_of_the_file_holds_up_nothing(file):
    found = Callers(file)
    file.unlink()
    os.mkfifo(file)
    found.look()
    assert name(found, TOKEN) == "alice", "those before it stay in force"
    with pytest.raises(RefusedError, match="is no regular file"):
        read_identities(file)


def test_a_disk_that_hangs_holds_up_no_call(file, monkeypatch):
    found, hangs, goes_on = Callers(file), threading.Event(), threading.Event()

    def hang(path):
        hangs.set()
        goes_on.wait(10)
        return read_identities(path)

    monkeypatch.setattr(callers, "read_identities", hang)
    monkeypatch.setattr(watched, "LOOK_SECONDS", 0.01)
    watched.keep_looking(found.look)
    file.write_text(TWO.replace(token_hash(TOKEN), token_hash("new")))
    assert hangs.wait(5)
    assert name(found, TOKEN) == "alice"
    goes_on.set()
    end = time.monotonic() + 5
    while found.may_read_metrics("Bearer new") is None:
        assert time.monotonic() < end, "and its change counts once it goes on"
        time.sleep(0.01)
