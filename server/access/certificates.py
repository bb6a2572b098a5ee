"""The certificate that the server shows, and the roots that clients' certificates must come from."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path
from typing import NamedTuple

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


class Certificates:
    """Certificate files, looked at for each connection and read again when they have changed.

    Files that are wrong when they are read again, as between two writes, leave those before them in force.

    Args:
        certificate: file of the certificate.
        key: file of its private key.
        client_ca: file of the roots of clients' certificates.

    Attributes:
        pem: in force.

    Raises:
        RefusedError: a file can't be read, or is not what it must be; the sentence names it.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._lock = threading.Lock()  # gRPC's threads ask
        self._seen = self._look()
        self.pem = self._read()
        self._context: ssl.SSLContext | None = None

    def renewed(self) -> Pem | None:
        """The files' contents if they have changed since the last call and are whole, else ``None``."""
        with self._lock:
            seen = self._look()
            if seen == self._seen:
                return None
            self._seen = seen
            try:
                self.pem = self._read()
            except RefusedError as error:
                log.error("%s; connections get the certificate read before", error)
                return None
            log.info("the certificate was read again from %s", self._certificate)
            return self.pem

    def context(self) -> ssl.SSLContext:
        """For a connection that Python's own TLS serves; it asks for no certificate of the client."""
        changed = self.renewed() is not None
        if self._context is None or changed:
            context = server_context()
            try:
                context.load_cert_chain(self._certificate, self._key)
            except (ssl.SSLError, OSError):
                if self._context is None:
                    raise
            else:
                self._context = context
        return self._context

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [stamp(file) for file in (self._certificate, self._key, self._client_ca) if file is not None]

    def _read(self) -> Pem:
        certificate = _contents("--tls-certificate", self._certificate)
        key = _contents("--tls-key", self._key)
        try:
            # An encrypted key is refused; without this OpenSSL would ask the terminal for its password.
            server_context().load_cert_chain(self._certificate, self._key, password=lambda: "")
        except (ssl.SSLError, ValueError, OSError) as error:
            raise RefusedError(
                f"--tls-certificate {self._certificate} and --tls-key {self._key} are not a certificate and "
                f"its unencrypted key in PEM ({_why(error)})"
            ) from error
        return Pem(certificate, key, None if self._client_ca is None else _roots(self._client_ca))


def server_context() -> ssl.SSLContext:
    """What a server of this machine's TLS library offers by default."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced, also behind a link; ``None`` without the file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


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
