"""What a server shows of itself: counts, Prometheus metrics, traces and logs.

Imports rsm_common alone; never gRPC.
Used by engine, recording, startup, rpc, http, server and commands.
"""
