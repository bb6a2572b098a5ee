"""Certificate files: what is refused, and when they are read again."""

from __future__ import annotations

import logging
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from server.access import certificates
from server.access.certificates import Certificates
from server.access.granted import granted, only_this_machine, warn_of_open_metrics
from server.errors import RefusedError
from server.settings import Settings
from tests.authority import Authority


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> tuple[Path, Path]:
    """A certificate and its key, as files of this test's own."""
    issued = authority.issue("first")
    return Path(shutil.copy(issued.certificate, tmp_path)), Path(shutil.copy(issued.key, tmp_path))


def test_files_are_read_again_when_they_have_changed(authority, files):
    found = Certificates(*files, authority.root)
    assert found.pem == (*(file.read_bytes() for file in files), authority.root.read_bytes())
    assert found.renewed() is None
    for file, new in zip(files, authority.issue("second"), strict=True):
        shutil.copy(new, file)
    found.look()
    assert found.renewed() == found.pem
    assert found.pem.certificate == files[0].read_bytes()
    assert found.renewed() is None


def test_files_between_two_writes_leave_those_before_in_force(authority, files, caplog):
    certificate, key = files
    found = Certificates(certificate, key, None)
    before, second = found.pem, authority.issue("second")
    shutil.copy(second.certificate, certificate)  # its key comes later
    with caplog.at_level(logging.ERROR):
        found.look()
        found.look()
        assert found.renewed() is None
    (record,) = caplog.records
    assert "are not a certificate and its unencrypted key" in record.getMessage()
    assert found.pem == before
    shutil.copy(second.key, key)
    found.look()
    assert found.renewed() is not None


def test_both_forms_come_from_one_reading(authority, files, monkeypatch):
    """A reading that fails for a moment leaves both as they were, and is tried again."""
    found, real = Certificates(*files, None), ssl.SSLContext.load_cert_chain
    before = found.pem, found.context()
    for file, new in zip(files, authority.issue("second"), strict=True):
        shutil.copy(new, file)

    def fail(*_, **__):
        raise OSError("too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(ssl.SSLContext, "load_cert_chain", fail)
        found.look()
        assert (found.pem, found.context()) == before
    loaded = []

    def record(self, certificate, key, **more):
        loaded.append(Path(certificate).read_bytes())
        files[0].write_text("replaced meanwhile")
        return real(self, certificate, key, **more)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", record)
    found.look()
    assert found.context() is not before[1]
    assert loaded == [found.pem.certificate] != [before[0].certificate]


def test_roots_may_have_comments_in_any_language(authority, files, tmp_path):
    roots = tmp_path / "roots.pem"
    roots.write_bytes("# Zertifikate für Kunden\n".encode("latin-1") + authority.root.read_bytes())
    assert Certificates(*files, roots).pem.client_ca == roots.read_bytes()


@pytest.mark.parametrize(
    ("days", "sentence"), [(31, "expired on"), (-1, "is valid from"), (25, "expires on"), (10, None)]
)
def test_certificates_that_are_not_valid_now_are_told(authority, files, monkeypatch, caplog, days, sentence):
    found, now = Certificates(*files, None), time.time()
    monkeypatch.setattr(certificates.time, "time", lambda: now + days * 86400)
    for file, new in zip(files, authority.issue("dated", days=30), strict=True):
        shutil.copy(new, file)
    found.look()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == (sentence is not None)
    assert all(sentence in each and str(files[0]) in each for each in told)
    assert abs(found.expiry - now - 30 * 86400) < 60


def test_wrong_files_are_refused_by_name(authority, files, tmp_path):
    certificate, key = files
    locked, nothing = tmp_path / "locked.key", tmp_path / "nothing.pem"
    nothing.write_text("nothing\n")
    command = ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    for given, sentence in (
        ((tmp_path / "gone", key, None), "--tls-certificate .*gone can't be read"),
        ((certificate, tmp_path / "gone", None), "--tls-key .*gone can't be read"),
        ((certificate, locked, None), "its unencrypted key in PEM"),
        ((certificate, authority.issue("other").key, None), "key values mismatch"),
        ((nothing, key, None), "not a certificate"),
        ((certificate, key, nothing), "--tls-client-ca .*nothing.pem has no root certificates"),
        ((certificate, key, certificate), "none of its certificates may sign others"),
    ):
        with pytest.raises(RefusedError, match=sentence):
            Certificates(*given)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tls_certificate": "c"}, "--tls-certificate needs --tls-key"),
        ({"tls_key": "k"}, "--tls-key needs --tls-certificate"),
        ({"tls_client_ca": "r"}, "--tls-client-ca needs --tls-certificate and --tls-key"),
    ],
)
def test_half_of_tls_is_refused(given, sentence):
    with pytest.raises(RefusedError, match=sentence):
        granted(Settings(**given))


def test_without_files_there_is_no_tls():
    for given in ({}, {"tls_certificate": "", "tls_key": "", "identities": ""}):
        access = granted(Settings(**given))
        assert (access.certificates, access.metrics_certificates, access.callers.open) == (None, None, True)


@pytest.fixture(scope="session")
def proofs(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Settings by what they give."""
    issued = authority.issue("served")
    identities = tmp_path_factory.mktemp("identities") / "identities.toml"
    identities.write_text("[a]\ncertificates = ['a']\n")
    return {
        "nothing": {},
        "tls": {"tls_certificate": issued.certificate, "tls_key": issued.key},
        "clients": {"tls_client_ca": authority.root},
        "identities": {"identities": identities},
    }


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "0", "192.0.2.1", "::ffff:192.0.2.1"])
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("nothing", "without TLS and showing who they are; give --tls-certificate and --tls-key and --id"),
        ("tls", "without showing who they are; give --identities .*, or listen on 127.0.0.1, or say --insec"),
        ("identities", "without TLS; give --tls-certificate and --tls-key, or"),
    ],
)
def test_an_address_that_others_reach_needs_tls_and_identities(proofs, host, given, sentence):
    with pytest.raises(RefusedError, match=sentence):
        granted(Settings(host=host, **proofs[given]))
    granted(Settings(host=host, insecure=True))
    granted(Settings(host=host, **proofs["tls"], **proofs["clients"]))
    granted(Settings(host=host, **proofs["tls"], **proofs["identities"]))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "::ffff:127.0.0.1"])
def test_this_machine_needs_nothing(host):
    assert only_this_machine(host)
    granted(Settings(host=host))


@pytest.mark.parametrize("host", ["", "no such name"])
def test_a_name_without_an_address_is_refused(host):
    """An empty one would be every address to gRPC."""
    with pytest.raises(RefusedError, match="no address has this name"):
        granted(Settings(host=host))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [({"metrics_tls": True}, "--metrics-tls needs"), ({"metrics_auth": True}, "--metrics-auth needs")],
)
def test_metrics_are_protected_by_what_grpc_has(given, sentence):
    with pytest.raises(RefusedError, match=sentence):
        granted(Settings(**given))


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({}, False),
        ({"metrics_host": "0.0.0.0"}, True),
        ({"metrics_host": "0.0.0.0", "metrics_auth": True}, True),
        ({"metrics_host": "0.0.0.0", "metrics_auth": True, "metrics_tls": True}, False),
        ({"metrics_host": "0.0.0.0", "insecure": True}, False),
    ],
)
def test_metrics_that_others_can_read_are_warned_of(caplog, given, warned):
    warn_of_open_metrics(Settings(**given))
    with pytest.raises(RefusedError, match="--metrics-host no such name: no address has this name"):
        warn_of_open_metrics(Settings(metrics_host="no such name"))
    assert [("other machines can read /metrics" in record.getMessage()) for record in caplog.records] == (
        [True] if warned else []
    )
