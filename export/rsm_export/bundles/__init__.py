"""Bundles: writing, inspecting and adopting them.

Imports rsm_serve.bundle, whose contract it obeys.
Used by exporter and the command line.
"""
