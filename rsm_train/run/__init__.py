"""One training run: the loop, its replay buffer, checkpoints, run directory and metrics.

Imports algorithms, environments, model and policy.
Used by the command line, rsm_export and rsm_eval.
"""
