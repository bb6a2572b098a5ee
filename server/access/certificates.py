"""The certificate that the server shows, and the roots that clients' certificates must come from."""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from server.access.watched import Watched
from server.errors import RefusedError

log = logging.getLogger("longspan.access")

_SOON_SECONDS = 7 * 86400.0


class Pem(NamedTuple):
    """Contents of the files, in PEM.

    Attributes:
        certificate: the server's, and those between it and its root.
        key: its private key.
        client_ca: roots of clients' certificates; ``None`` where clients need none.
    """

    certificate: bytes
    key: bytes
    client_ca: bytes | None


class _Loaded(NamedTuple):
    """One reading of the files: all is of the same bytes. Times are seconds since 1970."""

    pem: Pem
    context: ssl.SSLContext
    begins: float
    ends: float


class Certificates:
    """Certificate files, read again when ``look`` finds them changed.

    Files that are wrong when they are read again, as between two writes, leave those before them in force.

    Args:
        certificate: file of the certificate.
        key: file of its private key.
        client_ca: file of the roots of clients' certificates.

    Raises:
        RefusedError: a file can't be read, or is not what it must be; the sentence names it.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        files = [file for file in (certificate, key, client_ca) if file is not None]
        self._files = Watched(files, self._read, "connections get the certificate read before")
        self._given = self.pem

    @property
    def pem(self) -> Pem:
        """What is in force."""
        return self._files.value.pem

    @property
    def expiry(self) -> float:
        """When the certificate in force expires, in seconds since 1970."""
        return self._files.value.ends

    def look(self) -> None:
        """Reads the files again if they have changed."""
        if self._files.look():
            log.info("the certificate was read again from %s", self._certificate)
            self.warn_of_dates()

    def warn_of_dates(self) -> None:
        """Says that the certificate is not valid at this time, or only for some days more."""
        now, (*_, begins, ends) = time.time(), self._files.value
        wrong = None
        if now < begins:
            wrong = f"is valid from {_date(begins)} on: clients that check it refuse this server until then"
        elif now > ends:
            wrong = f"expired on {_date(ends)}: clients that check it refuse this server; renew it"
        elif now > ends - _SOON_SECONDS:
            wrong = f"expires on {_date(ends)}; renew it"
        if wrong is not None:
            log.warning("the certificate in --tls-certificate %s %s", self._certificate, wrong)

    def renewed(self) -> Pem | None:
        """The certificates in force if they have changed since the last call, else ``None``."""
        if self.pem is self._given:
            return None
        self._given = self.pem
        return self._given

    def context(self) -> ssl.SSLContext:
        """For a connection that Python's own TLS serves; it asks for no certificate of the client."""
        return self._files.value.context

    def _read(self) -> _Loaded:
        certificate = _contents("--tls-certificate", self._certificate)
        key = _contents("--tls-key", self._key)
        context = server_context()
        try:
            with _in_memory(certificate) as certificate_path, _in_memory(key) as key_path:
                # An encrypted key is refused; without this OpenSSL would ask the terminal for its password.
                context.load_cert_chain(certificate_path, key_path, password=lambda: "")
                begins, ends = _validity(certificate_path)
        except (ssl.SSLError, ValueError, OSError) as error:
            raise RefusedError(
                f"--tls-certificate {self._certificate} and --tls-key {self._key} are not a certificate and "
                f"its unencrypted key in PEM ({_why(error)})"
            ) from error
        roots = None if self._client_ca is None else _roots(self._client_ca)
        return _Loaded(Pem(certificate, key, roots), context, begins, ends)


@contextmanager
def _in_memory(contents: bytes) -> Iterator[str]:
    """A path of these bytes: Python's TLS loads a certificate only from files, which may change meanwhile."""
    with open(os.memfd_create("pem"), "wb") as file:
        file.write(contents)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def server_context() -> ssl.SSLContext:
    """What a server of this machine's TLS library offers by default."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def _roots(file: Path) -> bytes:
    roots = _contents("--tls-client-ca", file)
    try:
        context = server_context()
        with _in_memory(roots) as path:  # as text Python's TLS takes only ASCII, in comments too
            context.load_verify_locations(path)
        if not context.cert_store_stats()["x509_ca"]:
            raise ValueError("none of its certificates may sign others")
    except (ssl.SSLError, ValueError) as error:
        raise RefusedError(
            f"--tls-client-ca {file} has no root certificates in PEM ({_why(error)})"
        ) from error
    return roots


def _contents(flag: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RefusedError(f"{flag} {file} can't be read ({error.strerror or error})") from error


def _validity(path: str) -> tuple[float, float]:
    """When the first certificate of a file begins and ends to be valid, in seconds since 1970."""
    # Python's only reader of a certificate that is no root's.
    fields = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]
    return ssl.cert_time_to_seconds(fields["notBefore"]), ssl.cert_time_to_seconds(fields["notAfter"])


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return reason.lower().replace("_", " ") if isinstance(reason, str) else str(error)
