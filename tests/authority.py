"""A certificate authority of tests, made with the program openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class Issued(NamedTuple):
    """Files of one certificate."""

    certificate: Path
    key: Path


class Authority:
    """Issues certificates.

    Attributes:
        root: file of its own certificate.
    """

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl, which makes the certificates of these tests, is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.root, self._key = folder / "root.pem", folder / "root.key"
        _openssl("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.root, "-subj", "/CN=Test root")

    def issue(self, name: str, names: str = "DNS:localhost,IP:127.0.0.1", days: int = 2) -> Issued:
        """A certificate with ``name`` as common name, and alternative names in openssl's form."""
        file = self._folder / name.replace("/", "_")
        request, extension = file.with_suffix(".csr"), file.with_suffix(".ext")
        issued = Issued(file.with_suffix(".pem"), file.with_suffix(".key"))
        extension.write_text(f"subjectAltName={names}\n" if names else "")
        _openssl("req", *_KEY, "-keyout", issued.key, "-out", request, "-subj", f"/CN={name}")
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.root, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", f"{days}", "-out", issued.certificate, "-extfile", extension),
        )
        return issued


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30)
