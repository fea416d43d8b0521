"""Tokens, certificates, and the rules that say who may call what.

Imports rsm_common; only `server_tls` knows gRPC.
Used by client, config, rpc and server.
"""
