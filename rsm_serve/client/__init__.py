"""A remote policy as a `Policy`: synchronous and asyncio clients.

Imports rsm_common, wire and security; nothing but numpy, grpc and protobuf beside the standard library.
Used by robots, commands and rsm_eval.
"""

from rsm_serve.client.connection import Tls
from rsm_serve.client.sync import AsyncPolicyClient, PolicyClient, check_health

__all__ = ["AsyncPolicyClient", "PolicyClient", "Tls", "check_health"]
