"""The Open Inference Protocol: `inference.GRPCInferenceService` over the same lanes as rsm.v1.

Imports engine, wire, observe and security, and its siblings streams and status.
Used by rpc.endpoint alone.
"""
