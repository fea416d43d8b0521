"""Who may do what: tokens, certificates, and the files that hold them.

Imports rsm_common; only `server_tls` knows gRPC.
Used by client, rpc and server.
"""
