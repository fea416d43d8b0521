"""Records of requests and answers: their format, their files, and the recorder that writes them.

Imports observe, wire and pb; never gRPC.
Used by server and commands.
"""

from rsm_serve.recording.format import Record, read

__all__ = ["Record", "read"]
