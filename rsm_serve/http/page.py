"""The status page, and the rules for who may read it.

The page and its data are for a person at this machine: they show specifications and sample policies, and nobody
is asked for a token. So they are served on a loopback address only, under a loopback name (a site whose name
leads to this machine is refused), and not to requests from another site's page.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from http import HTTPStatus
from importlib import resources

from rsm_serve.addresses import is_loopback
from rsm_serve.http.server import Request, Response


@cache
def page() -> Response:
    """The status page; its security policy lets it run its own script and style, and nothing else."""
    text = resources.files("rsm_serve.http").joinpath("status.html").read_text(encoding="utf-8")
    sources = {
        tag: " ".join(_digest(body) for body in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return Response(text.encode(), "text/html; charset=utf-8", headers=headers)


def refusal(request: Request, *, on_loopback: bool) -> Response | None:
    """The answer to a request that may not read the page or its data; None if it may.

    Args:
        request: for anything but metrics and health.
        on_loopback: whether the server listens on a loopback address.
    """
    if not on_loopback:
        return Response(
            b"only /metrics and /healthz are served here; the status page needs a loopback --http\n",
            status=HTTPStatus.NOT_FOUND,
        )
    host = request.headers.get("host", "")
    if not is_loopback(host.rpartition(":")[0] or host):
        return Response(
            b"wanted localhost or a loopback number as the host's name\n", status=HTTPStatus.FORBIDDEN
        )
    foreign = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if foreign and request.path != "/":
        return Response(b"not for the pages of other sites\n", status=HTTPStatus.FORBIDDEN)
    return None


def _digest(content: str) -> str:
    """The name of an inline script or style in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
