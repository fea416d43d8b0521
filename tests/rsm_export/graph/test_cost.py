"""The cost of a graph, against a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from rsm_export.graph.cost import graph_cost
from rsm_export.graph.fold import fold
from rsm_export.graph.onnx_graph import build_graph

from tests.rsm_export.policies import random_policy, weights_of


def test_products_are_counted_by_hand():
    o, a, h, steps = 5, 3, 24, 4
    model = build_graph(
        fold(weights_of(random_policy(obs_size=o, action_size=a, hidden=(h,), steps=steps, particles=1)))
    )
    cost = graph_cost(model)
    products = 2 * (o * h + steps * 2 * a * h)
    activations = steps * 6 * h  # the observation's part added, and five operations of mish
    latents = 2 * steps * a + (steps - 1) * 3 * a + steps * a + 4 * a
    assert cost.flops == products + activations + latents
    weights = h * o + h + a * h + h * a + steps * h + steps + steps * a + 4 * a
    held = sum(4 for name in {t.name for t in model.graph.initializer} if name.startswith("scalar."))
    shapes = sum(8 * t.dims[0] for t in model.graph.initializer if t.name.startswith("shape."))
    assert cost.weight_bytes == 4 * weights + held + shapes
    assert cost.nodes == len(model.graph.node)


def test_particles_multiply_all_but_the_observation():
    few, many = (
        graph_cost(build_graph(fold(weights_of(random_policy(obs_size=48, particles=n, critics=1)))))
        for n in (2, 16)
    )
    of_the_observation = 2 * 48 * (24 + 24)  # of the denoiser and of the critic
    assert (many.flops - of_the_observation) / (few.flops - of_the_observation) == pytest.approx(8, rel=0.01)
    assert many.weight_bytes == few.weight_bytes


def test_bytes_are_those_of_the_element_types_and_of_one_row():
    box = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 6]) for name in "xy"]
    nodes = [
        helper.make_node(
            "Cast", ["x"], ["half"], to=TensorProto.FLOAT16
        ),  # writes 6 x 2 bytes, computes nothing
        helper.make_node("Reshape", ["half", "shape"], ["view"]),  # neither
        helper.make_node("Gemm", ["weight", "view"], ["product"], transA=1, transB=1),  # [6, 4]^T [1, 6]^T
        helper.make_node("Gemm", ["product", "other"], ["back"], transA=1),  # [4, 1]^T [4, 6]
        helper.make_node("Cast", ["back"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = [
        numpy_helper.from_array(np.zeros((6, 4), np.float16), "weight"),
        numpy_helper.from_array(np.zeros((4, 6), np.float16), "other"),
        numpy_helper.from_array(np.array([-1, 6], np.int64), "shape"),
    ]
    graph = helper.make_graph(nodes, "g", box[:1], box[1:], weights)
    cost = graph_cost(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10))
    assert cost.nodes == 5
    assert cost.flops == 2 * 4 * 6 + 2 * 6 * 4
    assert cost.weight_bytes == 2 * 24 + 2 * 24 + 2 * 8
    assert cost.activation_bytes == 6 * 2 + 4 * 2 + 6 * 2 + 6 * 4
