"""The bundle of a policy and the repository of bundles: reading, verifying, and the version to serve.

Imports rsm_common alone; never a runtime, gRPC or asyncio.
Used by sessions, local, engine, startup and commands, and by rsm_export, which writes bundles.
"""

from rsm_serve.bundle.contract import Bundle, load_bundle
from rsm_serve.bundle.probe import Probe

__all__ = ["Bundle", "Probe", "load_bundle"]
