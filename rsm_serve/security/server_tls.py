"""The server's side of TLS: certificates from files, used anew when the files change."""

from __future__ import annotations

from typing import Any

import grpc

from rsm_serve.security.pem import Pems, read_pems
from rsm_serve.security.settings import SecuritySettings
from rsm_serve.security.watched_files import Watched, warn_if_public


def server_credentials(settings: SecuritySettings) -> Any | None:
    """gRPC's credentials for the certificates of the settings; None if there are none.

    Renewed files are noticed at the next connection, at most once a second; connections that are open stay.
    Where the new ones are wrong, or only half of them is there yet, the old ones go on.

    Raises:
        ConfigError: the files cannot be read, are not PEM, or do not belong together.
    """
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if cert is None or key is None:
        return None
    warn_if_public(key)
    paths = [path for path in (cert, key, client_ca) if path is not None]
    watched = Watched(paths, lambda: read_pems(client_ca, cert, key))
    used = watched.value

    def renewed() -> Any | None:
        nonlocal used
        before, used = used, watched.value
        return None if used is before else _configuration(used)  # None: go on with what is there

    return grpc.dynamic_ssl_server_credentials(
        _configuration(used), renewed, require_client_authentication=client_ca is not None
    )


def _configuration(pems: Pems) -> Any:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], root_certificates=pems.ca)
