"""A request's way from its decoded rows to its answer: queue, batches, lanes, versions, action guard.

Imports bundle, local, observe and wire; never gRPC, HTTP or a message type.
Used by startup, config, rpc, http, server and commands.
"""
