"""Certificates of an authority that lives as long as a test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.hang import HANG_S

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def openssl(*arguments: object) -> None:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("certificates are made with the program openssl, which is not installed here")
    subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, timeout=HANG_S)


class Authority:
    """Signs certificates into a folder: `ca.pem`, and NAME.pem with NAME.key for each NAME."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ca = folder / "ca.pem"
        self._key = folder / "ca.key"
        openssl("req", "-x509", *_KEY, "-days", 2, "-subj", "/CN=test", "-keyout", self._key, "-out", self.ca)

    def sign(
        self,
        name: str,
        hosts: str = "DNS:localhost,IP:127.0.0.1",
        kind: tuple[str, ...] = _KEY,
        days: int = 2,
    ) -> tuple[Path, Path]:
        """(certificate, key), new ones in the place of older ones of that name.

        `kind`: openssl's arguments for the key, by default P-256. `days`: validity; below 0, it is over.
        """
        cert, key, request = (self.folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        extensions = self.folder / "extensions"
        extensions.write_text(f"subjectAltName={hosts}\n")
        openssl("req", *kind, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        signer = ("-CA", self.ca, "-CAkey", self._key, "-CAcreateserial", "-days", days)
        openssl("x509", "-req", "-in", request, *signer, "-extfile", extensions, "-out", cert)
        return cert, key
