"""Files and rules that say who may connect and who may call what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rsm_common.errors import ConfigError


@dataclass(frozen=True)
class SecuritySettings:
    """Certificates and tokens of a server.

    Raises:
        ConfigError: a certificate is given without its key, or authorities without a certificate.
    """

    tls_cert: Path | None = field(
        default=None,
        metadata={"help": "PEM certificate chain of the server: serve TLS.  [default: none, plaintext]"},
    )
    tls_key: Path | None = field(
        default=None, metadata={"help": "PEM private key of the certificate, without a password."}
    )
    tls_client_ca: Path | None = field(
        default=None,
        metadata={
            "help": "PEM certificates of authorities: a client needs a certificate that one of them signed."
        },
    )
    act_token_file: Path | None = field(
        default=None,
        metadata={"help": "File of tokens, one a line: a client needs one of them to act.  [default: none]"},
    )
    admin_token_file: Path | None = field(
        default=None,
        metadata={
            "help": "File of tokens that may act, load and unload.  [default: none, loading is switched off]"
        },
    )
    insecure: bool = field(
        default=False,
        metadata={"help": "Listen without TLS on addresses that other machines reach too."},
    )

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given = self.tls_cert or self.tls_key
            raise ConfigError(f"wanted --tls-cert and --tls-key together, got only {given}; give both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("wanted --tls-cert and --tls-key beside --tls-client-ca, got none; give both")
