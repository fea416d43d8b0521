"""Networks, critics and the diffusion process: pure functions of named parameters, and their fast forms.

Imports torch and the standard library, nothing else.
Used by algorithms, policy, run and rsm_export.
"""
