"""The environments that a run learns in: vector environments, episodes, and evaluation during training.

Imports gymnasium, numpy and rsm_eval.rollout; torch only in evaluation.
Used by run and the command line.
"""
