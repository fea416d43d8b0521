"""From a decoded request to its answer: queue, batches, lanes, versions, guards.

Imports bundle, sessions, observe, wire and local; never gRPC, HTTP or a message type.
Used by rpc, http and server.
"""
