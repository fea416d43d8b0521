"""What is in a bundle or in a bare graph, for people and for programs."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from rsm_common.commandline import aligned
from rsm_common.errors import BackendError, BundleError
from rsm_common.manifest import MANIFEST_FILE, file_record
from rsm_common.spec import PolicySpec
from rsm_export.checks.static_rules import check_static_rules
from rsm_serve.bundle.contract import PAYLOAD_FILES, Bundle, find_bundle, load_bundle, load_graph, read_manifest
from rsm_serve.bundle.onnx_file import POLICY_KEY, read_metadata
from rsm_serve.local import run_bundle
from rsm_serve.sessions.choice import RUNTIMES

_RUNTIME = "onnxruntime"
_SHOWN_ONE_BY_ONE = 8
"""Longer runs of elements with the same bounds become one line."""


def inspect_path(path: Path) -> dict[str, Any]:
    """All there is to know of a bundle or a graph.

    Args:
        path: a version directory, a policy directory (its current version), or a model.onnx.

    Returns:
        what JSON can hold: "path"; "kind" ("bundle" or "graph"); "problem", None or a sentence that says why it
        cannot be loaded and run; "files" (name -> size, sha256, and whether these are the manifest's, None
        without one); and, if it can be loaded, "policy" (policy.json, or what the graph's metadata says; None
        if it says nothing), "probe_rows", "graph" and "metadata".

    Raises:
        BundleError: there is no bundle or graph at the path, or its manifest cannot be read.
    """
    if path.is_file():
        return _inspect_graph(path)
    version_dir = find_bundle(path)
    report: dict[str, Any] = {"path": str(version_dir), "kind": "bundle", "problem": None}
    report["files"] = _files(version_dir)
    try:
        bundle = load_bundle(version_dir)
        report |= _content(bundle.model, bundle.spec) | {"probe_rows": len(bundle.probe.obs)}
        return report | {"problem": _run_problem(bundle)}
    except BundleError as error:  # what is damaged is not looked into
        return report | {"problem": str(error)}


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `inspect_path` as plain text."""
    sections = [_head(report), _table(["file", "bytes", "sha256", "manifest"], _file_rows(report["files"]))]
    if "graph" in report:
        policy = report["policy"]
        if policy is not None:
            sections += [_policy_text(policy, report["probe_rows"])]
            sections += [_box_table(kind, policy[kind]) for kind in ("observation", "action")]
            named = ("sampling", "accuracy", "evaluation", "provenance")
            sections += [_named_values(key, policy[key]) for key in named]
        sections += [_graph_text(report["graph"])]
        shown = {key: value for key, value in report["metadata"].items() if key != POLICY_KEY}
        if POLICY_KEY in report["metadata"]:
            shown[POLICY_KEY] = f"policy.json, {len(report['metadata'][POLICY_KEY])} characters"
        sections += [_named_values("metadata of the graph", shown)]
    return "\n\n".join(sections)


def _inspect_graph(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = {"path": str(path), "kind": "graph", "problem": None, "probe_rows": 0}
    try:
        model = path.read_bytes()
        text = read_metadata(model).get(POLICY_KEY)
        spec = None if text is None else PolicySpec.from_json(text)
        content = _content(model, spec)
    except OSError as error:
        raise BundleError(f"cannot read {str(path)!r}: {error.strerror}; check its permissions") from None
    except BundleError as error:
        raise BundleError(f"graph {path}: {error}") from None
    report |= {"files": {path.name: {**file_record(model), "verified": None}}} | content
    return report | {"problem": _graph_problem(path, model)}


def _graph_problem(path: Path, model: bytes) -> str | None:
    """Say why a bare graph cannot be run as a policy; None if it can."""
    try:
        bundle = load_graph(path)
        check_static_rules(onnx.load_from_string(model))
    except BundleError as error:
        return str(error)
    return _run_problem(bundle)


def _run_problem(bundle: Bundle) -> str | None:
    """Run a bundle or a graph once in onnxruntime, where it has the precision, and say what is wrong."""
    if bundle.spec.precision not in RUNTIMES[_RUNTIME].precisions:
        return None
    try:
        run_bundle(bundle, _RUNTIME)
    except (BundleError, BackendError) as error:
        return str(error)
    return None


def _files(version_dir: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file, and whether they are the manifest's (which has none of itself)."""
    manifest = read_manifest(version_dir)
    files: dict[str, dict[str, Any]] = {}
    for name in (*PAYLOAD_FILES, MANIFEST_FILE):
        file = version_dir / name
        record = file_record(file.read_bytes()) if file.is_file() else {"size": None, "sha256": None}
        files[name] = {**record, "verified": record == manifest[name] if name in manifest else None}
    return files


def _content(model: bytes, spec: PolicySpec | None) -> dict[str, Any]:
    return {
        "policy": None if spec is None else json.loads(spec.to_json()),
        "graph": graph_facts(model),
        "metadata": read_metadata(model),
    }


def graph_facts(model: bytes) -> dict[str, Any]:
    """Opset, operators, weights and tensors of an ONNX file, as JSON can hold them.

    Raises:
        BundleError: it is not an ONNX file.
    """
    try:
        proto = onnx.load_from_string(model)
        if not proto.HasField("graph"):
            raise ValueError("no graph")
    except Exception as error:  # protobuf's exceptions differ between its implementations
        raise BundleError(f"wanted an ONNX file, got {error}; export the policy again") from None
    graph = proto.graph
    count_of, bytes_of = Counter[str](), Counter[str]()
    for tensor in graph.initializer:
        kind = _dtype_name(tensor.data_type)
        count_of[kind] += 1
        bytes_of[kind] += _tensor_bytes(tensor)
    return {
        "producer": proto.producer_name,
        "ir_version": proto.ir_version,
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in proto.opset_import},
        "bytes": len(model),
        "nodes": len(graph.node),
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "initializers": {kind: {"count": count_of[kind], "bytes": bytes_of[kind]} for kind in sorted(count_of)},
        "inputs": {value.name: _value(value) for value in graph.input},
        "outputs": {value.name: _value(value) for value in graph.output},
    }


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    if tensor.raw_data or tensor.data_type not in onnx.helper.get_all_tensor_dtypes():
        return len(tensor.raw_data)
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in kind.shape.dim]
    return {"dtype": _dtype_name(kind.elem_type), "shape": shape}


def _dtype_name(number: int) -> str:
    known: dict[int, str] = {value: name for name, value in onnx.TensorProto.DataType.items()}
    return known.get(number, f"type {number}")


# --- as text ----------------------------------------------------------------------------------------------


def _head(report: Mapping[str, Any]) -> str:
    if report["problem"] is not None:
        state = f"cannot be run: {report['problem']}"
    elif report["kind"] == "bundle":
        state = "all hashes agree with the manifest"
    else:
        state = "a bare graph: there is no manifest to verify it by"
    return f"{report['path']}\n{state}"


def _file_rows(files: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    words = {True: "agrees", False: "DIFFERS", None: "-"}
    for name, record in files.items():
        if record["sha256"] is None:
            yield [name, "-", "-", "MISSING"]
        else:
            yield [name, str(record["size"]), record["sha256"], words[record["verified"]]]


def _policy_text(policy: Mapping[str, Any], probe_rows: int) -> str:
    steps, particles, _ = policy["noise_shape"]
    dt = policy["control_dt_s"]
    return _named_values(
        f"policy {policy['name']}, version {policy['version']}",
        {
            "algorithm": policy["algorithm"],
            "environment": policy["env_id"],
            "sizes": f"{len(policy['observation']['names'])} observations, "
            f"{len(policy['action']['names'])} actions, T = {steps} steps, N = {particles} particles",
            "noise": f"[B, {', '.join(map(str, policy['noise_shape']))}]",
            "control period": "not recorded" if dt is None else f"{dt:g} s",
            "sampler": policy["sampler"],
            "precision": policy["precision"],
            "tolerance": f"{policy['tolerance']:g} of the action range",
            "value q": "yes" if policy["has_q"] else "no",
            "probe": f"{probe_rows} rows",
            "schema version": policy["schema_version"],
        },
    )


def _box_table(kind: str, box: Mapping[str, Sequence[Any]]) -> str:
    rows = []
    elements = enumerate(zip(box["names"], box["low"], box["high"], strict=True))
    for (low, high), run in itertools.groupby(elements, key=lambda element: element[1][1:]):
        same = list(run)
        bounds = ["-inf" if low is None else f"{low:g}", "inf" if high is None else f"{high:g}"]
        if len(same) > _SHOWN_ONE_BY_ONE:
            (first, (first_name, *_)), (last, (last_name, *_)) = same[0], same[-1]
            rows.append([f"{first} to {last}", f"{first_name} to {last_name}", *bounds])
        else:
            rows += [[str(index), name, *bounds] for index, (name, *_) in same]
    return _table([kind, "name", "low", "high"], rows, left=2)


def _graph_text(graph: Mapping[str, Any]) -> str:
    def tensors(values: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{name} {value['dtype']} [{', '.join(map(str, value['shape']))}]" for name, value in values.items()
        )

    return _named_values(
        "graph",
        {
            "inputs": tensors(graph["inputs"]),
            "outputs": tensors(graph["outputs"]),
            "opset": ", ".join(f"{domain} {version}" for domain, version in graph["opsets"].items()),
            "IR version": graph["ir_version"],
            "producer": graph["producer"] or "not recorded",
            "size": f"{graph['bytes']} bytes",
            "nodes": f"{graph['nodes']}: " + ", ".join(f"{n} {op}" for op, n in graph["operators"].items()),
            "initializers": ", ".join(
                f"{held['count']} {kind} ({held['bytes']} bytes)"
                for kind, held in graph["initializers"].items()
            ),
        },
    )


def _named_values(title: str, values: Mapping[str, Any] | None) -> str:
    if not values:
        return f"{title}: not recorded"
    width = max(len(key) for key in values)
    return "\n".join([title, *(f"  {key.ljust(width)}  {_shown(value)}" for key, value in values.items())])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value)


def _table(head: list[str], rows: Iterator[list[str]] | list[list[str]], *, left: int = 1) -> str:
    return aligned([head, *rows], left=left)
