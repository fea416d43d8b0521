"""Messages of rsm.v1 <-> arrays, and who asks.

Imports rsm_common and the generated code; never gRPC.
Used by client, rpc, engine and recording.
"""
