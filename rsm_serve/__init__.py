"""Serving diffusion policies: the bundle contract, the batching gRPC server and its clients.

The names below are imported when they are first used, so that `import rsm_serve` is cheap. The clients need
only the base install. `open_policy` needs a runtime, such as the extra serve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rsm_common.lazy import lazy_names

if TYPE_CHECKING:
    from rsm_common.errors import RequestError as RequestError
    from rsm_common.errors import RsmError as RsmError
    from rsm_common.policy import ActResult as ActResult
    from rsm_common.policy import Adjustment as Adjustment
    from rsm_common.policy import Policy as Policy
    from rsm_common.policy import Timing as Timing
    from rsm_common.spec import PolicySpec as PolicySpec
    from rsm_serve.bundle.contract import Bundle as Bundle
    from rsm_serve.bundle.contract import load_bundle as load_bundle
    from rsm_serve.client import AsyncPolicyClient as AsyncPolicyClient
    from rsm_serve.client import PolicyClient as PolicyClient
    from rsm_serve.client import Tls as Tls
    from rsm_serve.client import check_health as check_health
    from rsm_serve.local import LocalPolicy as LocalPolicy
    from rsm_serve.local import open_policy as open_policy

    __version__: str

_HOMES = {
    "ActResult": "rsm_common.policy",
    "Adjustment": "rsm_common.policy",
    "AsyncPolicyClient": "rsm_serve.client",
    "Bundle": "rsm_serve.bundle.contract",
    "LocalPolicy": "rsm_serve.local",
    "Policy": "rsm_common.policy",
    "PolicyClient": "rsm_serve.client",
    "PolicySpec": "rsm_common.spec",
    "RequestError": "rsm_common.errors",
    "RsmError": "rsm_common.errors",
    "Timing": "rsm_common.policy",
    "Tls": "rsm_serve.client",
    "check_health": "rsm_serve.client",
    "load_bundle": "rsm_serve.bundle.contract",
    "open_policy": "rsm_serve.local",
}
"""The module of each public name."""

__all__ = [*_HOMES, "__version__"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
