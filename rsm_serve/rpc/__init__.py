"""The gRPC services: PolicyService, Open Inference Protocol, health, and what guards them.

Imports engine, wire, observe and security; grpc.
Used by server alone.
"""
