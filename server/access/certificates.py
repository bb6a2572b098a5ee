"""The certificate that the server shows, and the roots that clients' certificates must come from."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from server.access.watched import Watched
from server.errors import RefusedError

log = logging.getLogger("longspan.access")


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
    """One reading of the files: both forms are of the same bytes."""

    pem: Pem
    context: ssl.SSLContext


class Certificates:
    """Certificate files, looked at for each connection and read again when they have changed.

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

    @property
    def pem(self) -> Pem:
        """What is in force."""
        return self._files.value.pem

    def renewed(self) -> Pem | None:
        """The files' contents if they have changed since the last call and are whole, else ``None``."""
        if not self._files.look():
            return None
        log.info("the certificate was read again from %s", self._certificate)
        return self.pem

    def context(self) -> ssl.SSLContext:
        """For a connection that Python's own TLS serves; it asks for no certificate of the client."""
        self.renewed()
        return self._files.value.context

    def _read(self) -> _Loaded:
        certificate = _contents("--tls-certificate", self._certificate)
        key = _contents("--tls-key", self._key)
        context = server_context()
        try:
            with _in_memory(certificate) as certificate_path, _in_memory(key) as key_path:
                # An encrypted key is refused; without this OpenSSL would ask the terminal for its password.
                context.load_cert_chain(certificate_path, key_path, password=lambda: "")
        except (ssl.SSLError, ValueError, OSError) as error:
            raise RefusedError(
                f"--tls-certificate {self._certificate} and --tls-key {self._key} are not a certificate and "
                f"its unencrypted key in PEM ({_why(error)})"
            ) from error
        roots = None if self._client_ca is None else _roots(self._client_ca)
        return _Loaded(Pem(certificate, key, roots), context)


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
        context.load_verify_locations(cadata=roots.decode("ascii"))
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


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return reason.lower().replace("_", " ") if isinstance(reason, str) else str(error)
