"""The HTTP port: metrics, health, and the status page.

Imports engine and observe; never gRPC.
Used by server and commands.
"""
