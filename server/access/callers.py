"""From a call's token or certificate to the identity that it acts for."""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from server.access.identities import EVERYONE, NAME, Identity, read_identities, token_hash
from server.access.quota import Quota
from server.access.watched import Watched

log = logging.getLogger("longspan.access")

# So many are kept without a look at which of them are idle.
_MOST_CALLERS = 256
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
    else a certificate that it names, where a common name counts before alternative ones. With certificates
    alone, an identity is a certificate's common name, or its first alternative name, and has no limits.

    Args:
        file: of the identities; one that is wrong when it is read again leaves the one before it in force.
        certificates: whether clients show certificates, which TLS has checked.
        share_prefixes: whether identities find one another's prompts in the prefix cache.

    Raises:
        RefusedError: the file is not right.
    """

    def __init__(
        self, file: Path | None = None, *, certificates: bool = False, share_prefixes: bool = False
    ) -> None:
        self.file = file
        self._certificates = certificates
        self._share_prefixes = share_prefixes
        self._secret = secrets.token_bytes(32)
        self._watched = (
            None
            if file is None
            else Watched([file], lambda: _by_proof(file), "the identities read before stay in force")
        )
        self._callers: dict[str, Caller] = {}
        self._prune_at = _MOST_CALLERS
        self.everyone = Caller(EVERYONE, b"")

    @property
    def open(self) -> bool:
        """Whether calls need no proof of who they are."""
        return self.file is None and not self._certificates

    def by_token(self, headers: Iterable[tuple[str, str | bytes]]) -> Caller | None:
        """The caller whose token is in a call's metadata; ``None`` if only its certificate can tell.

        Raises:
            DeniedError: the token is not known, or there is none.
        """
        if self.file is None:
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
        """The caller that a connection's certificate names.

        Args:
            connection: gRPC's ``auth_context``.

        Raises:
            DeniedError: there is none that is known.
        """
        common = _texts(connection, "x509_common_name") if self._certificates else []
        others = _texts(connection, "x509_subject_alternative_name") if self._certificates else []
        names = common + others
        if self.file is None:
            if not names:
                raise DeniedError("the client's certificate has neither a common nor an alternative name")
            if not NAME.fullmatch(names[0]):
                raise DeniedError(
                    f"the certificate's name {names[0]!a} is none that an identity may have (up to 64 "
                    "letters, digits and . _ @ -); the operator can name the certificate in --identities"
                )
            return self._caller(Identity(names[0], max_priority=None))
        known = self._proofs.certificates
        for group in (common, others):
            found = {known[name].name: known[name] for name in group if name in known}
            if len(found) > 1:
                raise DeniedError(
                    f"the certificate of {names[0]!a} belongs to several identities; show a token"
                )
            for identity in found.values():
                return self._caller(identity)
        if names:
            raise DeniedError(f"the certificate of {names[0]!a} belongs to no identity here; show a token")
        raise DeniedError(_NO_TOKEN)

    def may_read_metrics(self, authorization: str) -> bool | None:
        """Whether the identity may that a header of HTTP proves; ``None`` if it proves none.

        It shows a token as bearer token, or as the password of its identity.
        """
        scheme, _, value = authorization.strip().partition(" ")
        user, token = None, value.strip()
        if scheme.lower() == "basic":
            try:
                user, _, token = base64.b64decode(token, validate=True).decode().partition(":")
            except ValueError:
                return None
        elif scheme.lower() != "bearer":
            return None
        found = self._owner(token)
        return found.metrics if found is not None and user in (None, found.name) else None

    def _owner(self, token: str) -> Identity | None:
        """The identity that a token proves.

        The time tells how a look-up of the token's SHA-256 went. Nothing of a token can be found by that: a
        caller who could choose the digest to ask for would have to invert SHA-256, as would one who knew it.
        """
        return self._proofs.digests.get(token_hash(token))

    def _caller(self, identity: Identity) -> Caller:
        caller = self._callers.get(identity.name)
        if caller is None:
            self._prune()
            caller = self._callers[identity.name] = Caller(identity, self._salt(identity.name))
        caller.identity = identity
        return caller

    def _prune(self) -> None:
        """Forgets idle ones that the file does not name, each time that their number has doubled."""
        if len(self._callers) < self._prune_at:
            return
        named = self._proofs.names
        self._callers = {
            name: caller for name, caller in self._callers.items() if caller.quota.in_flight or name in named
        }
        self._prune_at = max(_MOST_CALLERS, 2 * len(self._callers))

    def _salt(self, name: str) -> bytes:
        if self._share_prefixes:
            return b""
        return hashlib.blake2b(name.encode(), key=self._secret, digest_size=16).digest()

    def look(self) -> None:
        """Reads the file again if it has changed."""
        if self._watched is not None and self._watched.look():
            log.info("%d identities were read again from %s", len(self._watched.value.names), self.file)

    @property
    def _proofs(self) -> _ByProof:
        return _NONE if self._watched is None else self._watched.value


class _ByProof(NamedTuple):
    """A file's identities by SHA-256 of each token and by each name of certificates, and their names."""

    digests: dict[str, Identity]
    certificates: dict[str, Identity]
    names: frozenset[str]


_NONE = _ByProof({}, {}, frozenset())


def _by_proof(file: Path) -> _ByProof:
    identities = read_identities(file)
    return _ByProof(
        {digest: identity for identity in identities for digest in identity.token_sha256},
        {name: identity for identity in identities for name in identity.certificates},
        frozenset(identity.name for identity in identities),
    )


def _texts(connection: Mapping[str, Iterable[bytes]], key: str) -> list[str]:
    return [name.decode(errors="replace") for name in connection.get(key, ()) if name]


caller: ContextVar[Caller] = ContextVar("caller")
"""The caller of the call that this task serves; unset where the call was denied."""
