"""A remote policy as a `Policy`: synchronous and asyncio clients.

Imports rsm_common, wire, security and addresses; beside the standard library only numpy, grpc and protobuf.
Used by robots, commands and rsm_eval.
"""

from rsm_serve.client.aio import AsyncPolicyClient, AsyncPolicyStream
from rsm_serve.client.connection import Tls
from rsm_serve.client.health import check_health
from rsm_serve.client.sync import PolicyClient, PolicyStream

__all__ = ["AsyncPolicyClient", "AsyncPolicyStream", "PolicyClient", "PolicyStream", "Tls", "check_health"]
