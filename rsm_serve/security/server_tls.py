"""The server's side of TLS: certificates from files, read again when the files change."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc

from rsm_serve.security.pem import Pems, read_pems
from rsm_serve.security.settings import SecuritySettings
from rsm_serve.security.watched_files import Watched, warn_if_public
from rsm_serve.security.x509 import first_certificate

logger = logging.getLogger(__name__)


def server_credentials(settings: SecuritySettings) -> Any | None:
    """gRPC's credentials for the certificates of the settings; None if there are none.

    Renewed files are noticed at the next connection, at most once a second; open connections stay. The old
    certificates stay in use while the new files are wrong or incomplete.

    Raises:
        ConfigError: the files cannot be read, are not PEM, or do not belong together.
    """
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if cert is None or key is None:
        return None
    warn_if_public(key)
    paths = [path for path in (cert, key, client_ca) if path is not None]

    def read() -> Pems:
        pems = read_pems(client_ca, cert, key)
        _warn_of_dates(cert, pems)
        return pems

    watched = Watched(paths, read)
    used = watched.value

    def renewed() -> Any | None:
        nonlocal used
        before, used = used, watched.value
        return None if used is before else _configuration(used)  # None: go on with what is there

    return grpc.dynamic_ssl_server_credentials(
        _configuration(used), renewed, require_client_authentication=client_ca is not None
    )


def _warn_of_dates(cert: Path, pems: Pems) -> None:
    """Log a warning if the certificate is not valid now. Its dates may be right and the clock wrong."""
    certificate = first_certificate(pems.cert or b"")
    dates = "" if certificate is None else certificate.outside(datetime.now(timezone.utc))
    if dates:
        logger.warning(
            "clients refuse the certificate in %s, which is %s; set the clock, or renew the certificate",
            cert,
            dates,
        )


def _configuration(pems: Pems) -> Any:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], root_certificates=pems.ca)
