"""What a loadable policy is: the bundle directory, the repository of bundles, and reading ONNX files.

Imports rsm_common alone; never a runtime, gRPC or asyncio.
Used by rsm_export (which obeys it), sessions, engine and rsm_eval.
"""

from rsm_serve.bundle.contract import Bundle, load_bundle
from rsm_serve.bundle.probe import Probe

__all__ = ["Bundle", "Probe", "load_bundle"]
