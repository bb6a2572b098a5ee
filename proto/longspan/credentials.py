"""Certificate files of a client: read and checked before there is a connection that would only fail."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc


def credentials(
    ca: str | Path | None, cert: str | Path | None, key: str | Path | None
) -> grpc.ChannelCredentials:
    """The credentials and options of a channel by TLS.

    Args:
        ca: PEM file of the roots that the server's certificate must come from; ``None``: gRPC's own.
        cert: PEM file of the client's certificate, with ``key``.
        key: PEM file of its private key.

    Raises:
        ValueError: a file can't be read, or is not what it must be; or a certificate lacks its key.
    """
    if (cert is None) != (key is None):
        raise ValueError("cert and key belong together: give both (--cert, --key), or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    roots = None if ca is None else _read(ca)
    if roots is not None:
        try:
            context.load_verify_locations(cadata=roots.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(
                f"{ca} (ca, --ca) has no certificates in PEM; name a file of root certificates"
            ) from error
    if cert is None or key is None:
        return grpc.ssl_channel_credentials(roots)
    chain, private = _read(cert), _read(key)
    try:
        # gRPC takes no password; without this OpenSSL would ask the terminal for it.
        context.load_cert_chain(Path(cert).expanduser(), Path(key).expanduser(), password=lambda: "")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ValueError(
            f"{cert} (cert, --cert) and {key} (key, --key) are not a certificate and its "
            "unencrypted key in PEM"
        ) from error
    return grpc.ssl_channel_credentials(roots, private, chain)


def _read(file: str | Path) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"{file} can't be read ({error.strerror or error})") from error
