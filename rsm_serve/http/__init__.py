"""The HTTP port: metrics, health, and the status page.

Imports engine, observe and addresses; never gRPC.
Used by server and commands.
"""
