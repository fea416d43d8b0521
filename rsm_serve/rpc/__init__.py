"""The gRPC services: PolicyService, Open Inference Protocol, health, reflection, and the checks before them.

Imports engine, wire, observe, security and addresses; grpc.
Used by server alone.
"""
