"""What an ONNX file may not hide from the check that it needs no other file."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import AttributeProto, ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from rsm_common.errors import BundleError
from rsm_serve.bundle.onnx_file import MODEL_GRAPH, check_self_contained, fields

ADD = helper.make_node("Add", ["x", "w"], ["y"])
INSIDE = numpy_helper.from_array(np.ones(4, np.float32), "w")
ONE = np.array([1], np.int64)


def outside(name="w", kind=TensorProto.FLOAT, size=4):
    tensor = TensorProto(name=name, data_type=kind, dims=[size], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    return tensor


def model(*nodes, tensors=()):
    box = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([*nodes], "g", box[:1], box[1:], [*tensors])
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def sparse(values, indices):
    return SparseTensorProto(values=values, indices=indices, dims=[4])


def sparse_initializer(values, indices):
    made = model(ADD)
    made.graph.sparse_initializer.append(sparse(values, indices))
    return made


def attribute(kind, **content):
    node = helper.make_node("Constant", [], ["w"])
    node.attribute.append(AttributeProto(name="value", type=kind, **content))
    return model(node, ADD)


def function(in_body):
    constant = helper.make_node("Constant", [], ["w"])
    opset = [helper.make_opsetid("", 19)]
    held = AttributeProto(name="value", type=AttributeProto.TENSOR, t=outside())
    if in_body:
        constant.attribute.append(held)
    else:
        constant.attribute.add(name="value", ref_attr_name="value", type=AttributeProto.TENSOR)
    made = model(helper.make_node("F", ["x"], ["y"], domain="local"))
    made.functions.append(helper.make_function("local", "F", ["x"], ["y"], [constant, ADD], opset))
    if not in_body:
        made.functions[0].attribute_proto.append(held)
    return made


def subgraph(nodes, tensors):
    result = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])]
    branch = helper.make_graph([*nodes, helper.make_node("Add", ["x", "w"], ["z"])], "b", [], result, tensors)
    condition = numpy_helper.from_array(np.array(True), "c")
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return model(node, tensors=[condition])


def training():
    made = model(ADD, tensors=[INSIDE])
    made.training_info.add().initialization.initializer.append(outside("other"))
    return made


def varint(value):
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def hidden_by_a_long_tag():
    """protobuf in C++ keeps 32 bits of a tag; a reader that keeps more finds another field number."""
    graph = model(ADD, tensors=[outside()]).graph.SerializeToString()
    without = model(ADD)
    without.ClearField("graph")
    tag = varint(MODEL_GRAPH << 3 | 2 | 1 << 32)
    return without.SerializeToString() + tag + varint(len(graph)) + graph


def merged():
    """A field that comes twice is merged."""
    more = ModelProto()
    more.graph.initializer.append(outside())
    return model(ADD).SerializeToString() + more.SerializeToString()


CASES = {
    "initialiser": model(ADD, tensors=[outside()]),
    "values of a sparse initialiser": sparse_initializer(outside(size=1), numpy_helper.from_array(ONE, "i")),
    "indices of a sparse initialiser": sparse_initializer(
        numpy_helper.from_array(np.ones(1, np.float32), "w"), outside("i", TensorProto.INT64, 1)
    ),
    "constant": attribute(AttributeProto.TENSOR, t=outside()),
    "constants": attribute(AttributeProto.TENSORS, tensors=[INSIDE, outside()]),
    "sparse constant": attribute(
        AttributeProto.SPARSE_TENSOR,
        sparse_tensor=sparse(outside(size=1), numpy_helper.from_array(ONE, "i")),
    ),
    "sparse constants": attribute(
        AttributeProto.SPARSE_TENSORS,
        sparse_tensors=[sparse(outside(size=1), numpy_helper.from_array(ONE, "i"))],
    ),
    "body of a function": function(in_body=True),
    "default of a function": function(in_body=False),
    "initialiser of a subgraph": subgraph([], [outside()]),
    "constant of a subgraph": subgraph([helper.make_node("Constant", [], ["w"], value=outside())], []),
    "training": training(),
    "second graph field": merged(),
}


def content_of(case):
    return case if isinstance(case, bytes) else case.SerializeToString()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_tensor_in_another_file_is_refused_wherever_it_stands(case):
    with pytest.raises(BundleError, match="wanted a graph that holds its weights itself, got tensor"):
        check_self_contained(content_of(case))


def test_onnxruntime_would_read_one_even_of_a_model_given_as_bytes(tmp_path, monkeypatch):
    """Why sparse tensors matter."""
    np.array([7], np.float32).tofile(tmp_path / "w.bin")
    monkeypatch.chdir(tmp_path)
    session = onnxruntime.InferenceSession(content_of(CASES["values of a sparse initialiser"]))
    assert session.run(None, {"x": np.zeros(4, np.float32)})[0].tolist() == [0, 7, 0, 0]


def test_a_tag_of_more_than_32_bits_is_refused(tmp_path):
    content = hidden_by_a_long_tag()
    (tmp_path / "m.onnx").write_bytes(content)
    np.full(4, 7, np.float32).tofile(tmp_path / "w.bin")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert session.run(None, {"x": np.zeros(4, np.float32)})[0].tolist() == [7, 7, 7, 7], "it sees the graph"
    with pytest.raises(BundleError, match="wanted an ONNX file"):
        check_self_contained(content)
    with pytest.raises(ValueError, match="protobuf tag"):
        list(fields(content))


def test_graphs_in_graphs_without_end_are_refused():
    content = b""
    for _ in range(2000):
        attribute_bytes = b"\x32" + varint(len(content)) + content  # g
        node = b"\x2a" + varint(len(attribute_bytes)) + attribute_bytes
        content = b"\x0a" + varint(len(node)) + node
    with pytest.raises(BundleError, match="wanted an ONNX file"):
        check_self_contained(b"\x3a" + varint(len(content)) + content)


@pytest.mark.parametrize(
    "case",
    [
        model(ADD, tensors=[INSIDE]),
        attribute(AttributeProto.TENSOR, t=INSIDE),
        sparse_initializer(
            numpy_helper.from_array(np.ones(1, np.float32), "w"), numpy_helper.from_array(ONE, "i")
        ),
        subgraph([], [INSIDE]),
    ],
    ids=["initialiser", "constant", "sparse initialiser", "subgraph"],
)
def test_tensors_in_the_file_are_not_refused(case):
    check_self_contained(content_of(case))
