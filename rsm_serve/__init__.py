"""Serving diffusion policies: the bundle contract, the batching gRPC server and its client."""
