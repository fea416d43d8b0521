"""DPMD, SDAC and SAC, one file each, and the parts that they share.

Imports model, torch and the standard library, nothing else.
Used by run and config.
"""
