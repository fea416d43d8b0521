"""What a server tells about itself: counts, Prometheus metrics, traces, logs.

Imports rsm_common; never gRPC.
Used by engine, rpc, http and server.
"""
