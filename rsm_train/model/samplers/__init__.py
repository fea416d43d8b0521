"""Samplers: how a policy's networks become actions.

A sampler is a frozen dataclass of settings. It knows its networks, its saved form and its record in
policy.json, and prepares the weights that act. Another kind of policy is a module here and one entry of
`registry.SAMPLERS`, with its graph in `rsm_export.graph`.
"""
