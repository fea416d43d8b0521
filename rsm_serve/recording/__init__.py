"""Records of requests and answers: their format, and the recorder that writes them.

Imports rsm_common, wire and observe; never gRPC.
Used by engine, server and commands.
"""

from rsm_serve.recording.format import Record, read

__all__ = ["Record", "read"]
