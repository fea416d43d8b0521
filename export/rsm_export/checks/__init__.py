"""The checks that a graph must pass before it is written.

Imports graph, rsm_serve.sessions, onnx and onnxruntime.
Used by exporter and bundles.
"""
