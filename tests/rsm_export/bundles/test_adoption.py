"""A bare graph becomes a bundle only if it can be served: it runs, is not random and does not mix rows."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from rsm_export.cli import main

from rsm_serve.bundle.contract import load_bundle
from tests.bundles import make_model, make_spec
from tests.rsm_export.embedding import with_spec

SPEC = make_spec("arm")


def changed(change):
    model = onnx.load_from_string(with_spec(make_model(SPEC), SPEC))
    change(model.graph)
    return model.SerializeToString()


def add_to_action(graph, node, name):
    """Add what a node gives to the action."""
    for existing in graph.node:
        existing.output[:] = ["inner" if output == "action" else output for output in existing.output]
    graph.node.extend([node, helper.make_node("Add", ["inner", name], ["action"])])


def random_rows(graph):
    add_to_action(graph, helper.make_node("RandomNormalLike", ["inner"], ["extra"], scale=0.01), "extra")


def mixed_rows(graph):
    """Replace every action by its mean with the mean action of all rows, which is within the bounds, too."""
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    graph.initializer.extend([axes, numpy_helper.from_array(np.array(0.5, np.float32), "half")])
    add_to_action(graph, helper.make_node("ReduceMean", ["inner", "axes"], ["mean"], keepdims=1), "mean")
    graph.node[-1].output[0] = "sum"
    graph.node.append(helper.make_node("Mul", ["sum", "half"], ["action"]))


def with_an_unknown_operator(graph):
    add_to_action(graph, helper.make_node("NoSuchOperator", ["inner"], ["extra"]), "extra")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (random_rows, "must not contain ONNX operator RandomNormalLike"),
        (mixed_rows, "wanted rows that do not depend on each other"),
        (with_an_unknown_operator, "NoSuchOperator"),
    ],
)
def test_a_graph_that_cannot_be_served_is_refused(tmp_path, capsys, change, words):
    bare, repo = tmp_path / "bare.onnx", tmp_path / "repo"
    bare.write_bytes(changed(change))
    assert main([str(bare), "--repo", str(repo)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not repo.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [(random_rows, "RandomNormalLike"), (with_an_unknown_operator, "NoSuchOperator")],
)
def test_inspect_does_not_call_a_graph_sound_that_cannot_be_run(tmp_path, capsys, change, words):
    bare = tmp_path / "bare.onnx"
    bare.write_bytes(changed(change))
    assert main(["inspect", str(bare)]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert "cannot be run" in printed.out
    assert "operators" in printed.out or "nodes" in printed.out, "what can be read is still shown"


def test_a_sound_graph_is_adopted(tmp_path):
    bare = tmp_path / "bare.onnx"
    bare.write_bytes(changed(lambda graph: None))
    assert main([str(bare), "--repo", str(tmp_path / "repo")]) == 0
    assert load_bundle(tmp_path / "repo" / "arm").model == bare.read_bytes()
