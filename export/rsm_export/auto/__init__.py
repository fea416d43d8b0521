"""rsm-export --auto: the search for the cheapest chain that returns as much as the full policy.

Imports build, rsm_eval and matplotlib, only where returns are asked for.
Used by exporter and the command line.
"""
