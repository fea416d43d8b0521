"""From a policy's weights to one ONNX graph: the folded chain, its operators, its cost.

Imports rsm_train.model and onnx.
Used by build, checks and auto.
"""
