"""From a call's token or certificate to the identity that it acts for."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path

from server.access.certificates import stamp
from server.access.identities import EVERYONE, Identity, read_identities, token_hash
from server.access.quota import Quota
from server.errors import RefusedError

log = logging.getLogger("longspan.access")

# How often a file is looked at, at most: a call costs no look at the disk.
_LOOK_SECONDS = 1.0
_SCHEME = "bearer "
_NO_TOKEN = "the call shows no token; send it as metadata, 'authorization: Bearer TOKEN' (--token)"


class DeniedError(Exception):
    """A call proves no identity; the message is a sentence."""


class Caller:
    """An identity as it acts: what it may do, and what it has under way.

    Attributes:
        identity: as it is now; a file that changes replaces it.
        quota: what it has in flight and has used.
        salt: begins the keys of its pages in the prefix cache; empty where all share them.
    """

    def __init__(self, identity: Identity, salt: bytes) -> None:
        self.identity = identity
        self.quota = Quota()
        self.salt = salt


class Callers:
    """All identities, by what proves them.

    Without a file and certificates every call is ``everyone``'s. With a file a call shows a token of it, or
    else a certificate that it names. With certificates alone, an identity is a certificate's common name, or
    its first alternative name, and has no limits.

    Args:
        file: of the identities, looked at again at most every second; one that is wrong then leaves the one
            before it in force.
        certificates: whether clients show certificates, which TLS has checked.
        share_prefixes: whether identities find one another's prompts in the prefix cache.

    Raises:
        RefusedError: the file is not right.
    """

    def __init__(
        self, file: Path | None = None, *, certificates: bool = False, share_prefixes: bool = False
    ) -> None:
        self._file = file
        self._certificates = certificates
        self._share_prefixes = share_prefixes
        self._secret = secrets.token_bytes(32)
        self._looked, self._seen = time.monotonic(), None if file is None else stamp(file)
        self._identities = () if file is None else read_identities(file)
        self._callers: dict[str, Caller] = {}
        self.everyone = Caller(EVERYONE, b"")

    @property
    def open(self) -> bool:
        """Whether calls need no proof of who they are."""
        return self._file is None and not self._certificates

    def by_token(self, headers: Iterable[tuple[str, str | bytes]]) -> Caller | None:
        """Who shows a token in the metadata of a call; ``None`` if only its certificate can tell.

        Raises:
            DeniedError: the token is not known, or there is none.
        """
        if self._file is None:
            return self.everyone if self.open else None
        shown = [value for key, value in headers if key == "authorization"]
        if not shown:
            if self._certificates:
                return None
            raise DeniedError(_NO_TOKEN)
        token = shown[0] if isinstance(shown[0], str) else ""
        if len(shown) > 1 or not token.lower().startswith(_SCHEME):
            raise DeniedError("the call's authorization is not of the form 'Bearer TOKEN'")
        found = self._owner(token[len(_SCHEME) :].strip())
        if found is None:
            raise DeniedError(
                "the call's token is not known here, or no longer; ask the operator for another"
            )
        return self._caller(found)

    def by_certificate(self, connection: Mapping[str, Iterable[bytes]]) -> Caller:
        """Who a connection's certificate speaks for.

        Args:
            connection: gRPC's ``auth_context``.

        Raises:
            DeniedError: there is none that is known.
        """
        names = _names(connection) if self._certificates else []
        if self._file is None:
            if not names:
                raise DeniedError("the client's certificate has neither a common nor an alternative name")
            return self._caller(Identity(names[0], max_priority=None))
        self._look()
        for identity in self._identities:
            if set(names) & set(identity.certificates):
                return self._caller(identity)
        if names:
            raise DeniedError(f"the certificate of {names[0]!a} belongs to no identity here; show a token")
        raise DeniedError(_NO_TOKEN)

    def may_read_metrics(self, authorization: str) -> bool:
        """Whether a header of HTTP shows a token that may, as bearer token or as password of its identity."""
        scheme, _, value = authorization.strip().partition(" ")
        user, token = None, value.strip()
        if scheme.lower() == "basic":
            try:
                user, _, token = base64.b64decode(token, validate=True).decode().partition(":")
            except ValueError:
                return False
        elif scheme.lower() != "bearer":
            return False
        found = self._owner(token)
        return found is not None and found.metrics and user in (None, found.name)

    def _owner(self, token: str) -> Identity | None:
        """The identity that a token proves."""
        self._look()
        found, given = None, token_hash(token)
        for identity in self._identities:
            for known in identity.token_sha256:  # all of them, so that the time tells nothing of which fit
                if hmac.compare_digest(given, known):
                    found = identity
        return found

    def _caller(self, identity: Identity) -> Caller:
        caller = self._callers.get(identity.name)
        if caller is None:
            caller = self._callers[identity.name] = Caller(identity, self._salt(identity.name))
        caller.identity = identity
        return caller

    def _salt(self, name: str) -> bytes:
        if self._share_prefixes:
            return b""
        return hashlib.blake2b(name.encode(), key=self._secret, digest_size=16).digest()

    def _look(self) -> None:
        """Reads the file again if it has changed."""
        now = time.monotonic()
        if self._file is None or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        seen = stamp(self._file)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._identities = read_identities(self._file)
        except RefusedError as error:
            log.error("%s; the identities read before stay in force", error)
        else:
            log.info("%d identities were read again from %s", len(self._identities), self._file)


def _names(connection: Mapping[str, Iterable[bytes]]) -> list[str]:
    """The names of a certificate: the common one first."""
    shown = [*connection.get("x509_common_name", ()), *connection.get("x509_subject_alternative_name", ())]
    return [name.decode(errors="replace") for name in shown if name]


caller: ContextVar[Caller] = ContextVar("caller", default=Caller(EVERYONE, b""))  # noqa: B039 (changed never)
"""Who makes the call that this task serves."""
