"""Who may import whom (docs/explanation/architecture.md): every import statement of every package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hang import HANG_S

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "rsm_common": ROOT / "rsm_common",
    "rsm_train": ROOT / "rsm_train",
    "rsm_serve": ROOT / "rsm_serve",
    "rsm_eval": ROOT / "rsm_eval",
    "rsm_export": ROOT / "export" / "rsm_export",
}
SESSIONS = "rsm_serve.sessions."
# A runtime and the modules that may import it.
RUNTIMES = {
    "onnxruntime": (SESSIONS + "onnxruntime",),
    "openvino": (SESSIONS + "openvino",),
    "tensorrt": (SESSIONS + "tensorrt", SESSIONS + "tensorrt_engine"),
    "cuda": (SESSIONS + "tensorrt",),
}
# Of the two above and what they alone need: nothing but these may be added to the standard library.
TENSORRT_MODULES = ("tensorrt", "tensorrt_engine", "engine_cache", "onnx_structure")
TENSORRT_NEEDS = ("tensorrt", "cuda.bindings", "numpy", "rsm_common", "rsm_serve")
CLIENT = ("rsm_serve.client", "rsm_serve.commands.client_cli")
# Of rsm_serve, only these may know gRPC.
GRPC = ("rpc", "client", "security.server_tls", "commands.client_cli")
# Rooms of rsm_serve and the rooms that each may import.
ARROWS: dict[str, set[str]] = {
    "addresses": set(),
    "bundle": set(),
    "observe": set(),
    "wire": {"pb"},
    "security": set(),
    "sessions": {"bundle"},
    "local": {"bundle", "sessions"},
    "recording": {"observe", "pb", "wire"},
    "engine": {"bundle", "local", "observe", "wire"},
    "config": {"addresses", "engine", "security", "sessions"},
    "startup": {"bundle", "config", "engine", "observe"},
    "client": {"addresses", "pb", "security", "wire"},
    "rpc": {"addresses", "engine", "observe", "pb", "security", "wire"},
    "http": {"addresses", "engine", "observe"},
    "server": {
        *("addresses", "config", "engine", "http", "observe"),
        *("recording", "rpc", "security", "startup"),
    },
    "commands": {
        *("addresses", "bundle", "client", "config", "engine", "http", "local"),
        *("observe", "recording", "security", "server", "sessions"),
    },
}
PURE_TRAINING = ("model", "algorithms")
EXPORT_WITH_RETURNS = ("rsm_export.auto",)
# Come with grpc, which imports the last two itself where they are installed, and with Cython's extensions.
ALWAYS = {"typing_extensions", "cython_runtime", "grpc_health", "grpc_reflection"}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of a package, generated code left out."""
    folder = PACKAGES[package]
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] == "pb":
            continue
        yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def imports(path: Path, module: str, *, top_level: bool = False) -> set[str]:
    """Dotted names of all that a file imports; `top_level`: only what importing the file itself imports."""
    found: set[str] = set()

    def skipped(node: ast.AST) -> bool:
        """Not run when the file is imported."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return True
        return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module.split(".")[: -child.level]
                    base = ".".join([*package, base]).rstrip(".")
                # `from package import module` imports the module too.
                found.update({base} | {f"{base}.{alias.name}" for alias in child.names})
            elif not (top_level and skipped(child)):
                walk(child)

    walk(ast.parse(path.read_text()))
    return found


def forbidden(names: set[str], roots: tuple[str, ...]) -> set[str]:
    return {name for name in names if any(name == root or name.startswith(root + ".") for root in roots)}


def outside(names: set[str], allowed: tuple[str, ...]) -> set[str]:
    """Names that are neither of the standard library nor below one of the allowed."""
    others = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    return others - forbidden(others, allowed)


ALL = [(package, name, path) for package in PACKAGES for name, path in modules(package)]


def below(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def room_of(name: str) -> str:
    """The folder or module directly below rsm_serve that a module belongs to; empty outside of rsm_serve."""
    return name.removeprefix("rsm_serve.").partition(".")[0] if name.startswith("rsm_serve.") else ""


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that leads back to its first node, empty if the graph has none."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        for successor in sorted(graph.get(node, set()) - finished):
            if found := visit(successor, [*path, node]):
                return found
        finished.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


@pytest.mark.parametrize(("package", "name", "path"), ALL, ids=[name for _, name, _ in ALL])
def test_every_module_keeps_the_table(package, name, path):
    names = imports(path, name)
    if package == "rsm_serve":
        assert not forbidden(names, ("torch", "onnx", "gymnasium", "rsm_train", "rsm_export", "rsm_eval"))
        runtimes = [runtime for runtime, homes in RUNTIMES.items() if name not in homes]
        assert not forbidden(names, tuple(runtimes))
        if not below(name, tuple(f"rsm_serve.{part}" for part in GRPC)):
            assert not forbidden(names, ("grpc", "grpc_health", "grpc_reflection"))
        if name != package:  # which names the public names of every room, and imports them when they are used
            rooms = {room_of(other) for other in names} - {room_of(name), ""}
            assert rooms <= ARROWS.get(room_of(name), set())
    if name in {SESSIONS + part for part in TENSORRT_MODULES}:
        assert not outside(names - {"cuda"}, TENSORRT_NEEDS)
    if package == "rsm_common":
        assert not forbidden(names, ("rsm_serve", "rsm_train", "rsm_eval", "rsm_export"))
        assert not outside(names, ("numpy", "click", "rsm_common"))
    if below(name, tuple(f"rsm_train.{part}" for part in PURE_TRAINING)):
        assert not outside(names, ("torch", *(f"rsm_train.{part}" for part in PURE_TRAINING))) - {"rsm_train"}
    if package in ("rsm_train", "rsm_eval"):
        assert not forbidden(names, ("onnx", *RUNTIMES, "rsm_export"))
    if package == "rsm_eval":
        assert not forbidden(imports(path, name, top_level=True), ("rsm_train",))
    if package == "rsm_export":
        # The exporter obeys the bundle contract; it does not know the server, and the evaluator only where
        # returns are asked for.
        assert not forbidden(
            names, ("rsm_serve.server", "rsm_serve.engine.batcher", "rsm_serve.client", "grpc")
        )
        if not below(name, EXPORT_WITH_RETURNS):
            at_import = imports(path, name, top_level=True)
            assert not forbidden(at_import, ("rsm_eval", "matplotlib", *EXPORT_WITH_RETURNS))


def test_the_rooms_of_the_server_form_no_circle():
    assert circle(ARROWS) == []


def test_the_table_of_rooms_allows_nothing_that_is_not_used():
    used: dict[str, set[str]] = {}
    for name, path in modules("rsm_serve"):
        used.setdefault(room_of(name), set()).update(room_of(other) for other in imports(path, name))
    rooms = {room: others - {room, ""} for room, others in used.items() if room}
    assert rooms == {room: ARROWS.get(room, set()) for room in rooms}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_modules_of_a_package_form_no_circle(package):
    files = dict(modules(package))
    graph = {name: {other for other in imports(path, name) if other in files} for name, path in files.items()}
    # A package's `__init__` is imported before each of its modules, and may import them.
    inits = {name for name, path in files.items() if path.name == "__init__.py"}
    assert circle({name: others - inits - {name} for name, others in graph.items()}) == []


def test_a_circle_is_found():
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"b"}, "d": {"c"}}) == ["b", "d", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_the_clients_closure_needs_only_the_base_install():
    files = dict(modules("rsm_serve")) | dict(modules("rsm_common"))
    seen: set[str] = set()
    todo = list(CLIENT)
    while todo:
        name = todo.pop()
        if name in seen or name not in files:
            continue
        seen.add(name)
        names = imports(files[name], name, top_level=True)
        assert not outside(names, ("numpy", "grpc", "google.protobuf", "click", "rsm_common", "rsm_serve")), (
            name
        )
        todo.extend(names)
    assert {"rsm_serve.client", "rsm_serve.wire.codec", "rsm_common.policy", "rsm_common.errors"} <= seen
    assert "rsm_serve.server" not in seen


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("rsm_serve.client", {"numpy", "grpc", "google", "rsm_serve", "rsm_common"}),
        ("rsm_serve.commands.client_cli", {"numpy", "grpc", "google", "rsm_serve", "click", "rsm_common"}),
        ("rsm_serve.engine.batcher", {"rsm_serve", "rsm_common"}),
        ("rsm_serve.bundle", {"numpy", "rsm_serve", "rsm_common"}),
        ("rsm_common.policy", {"numpy", "rsm_common"}),
        ("rsm_common.errors", {"rsm_common"}),
        ("rsm_serve.observe.settled", {"rsm_serve", "rsm_common"}),
        ("rsm_serve.observe.logs", {"rsm_serve", "rsm_common"}),
        ("rsm_serve.local", {"numpy", "rsm_serve", "click", "rsm_common"}),
        ("rsm_serve.sessions.choice", {"numpy", "rsm_serve", "click", "rsm_common"}),
    ],
)
def test_what_a_module_really_loads(module, allowed):
    code = (
        f"import sys; before = set(sys.modules); import {module}\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True
    )
    loaded = {name for name in output.stdout.split() if name not in sys.stdlib_module_names}
    loaded = {name for name in loaded if not name.startswith("_")} - ALWAYS
    assert loaded <= allowed
    assert module.split(".")[0] in loaded


def test_the_rules_themselves_can_fail(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch.nn as nn\nfrom rsm_train import loop\n"
        "from . import cousin\nfrom ..parent import thing\n"
        "if TYPE_CHECKING:\n    import onnx\ndef f():\n    import gymnasium\n"
    )
    names = imports(path, "a.b.module")
    assert forbidden(names, ("torch", "gymnasium", "rsm_train.loop", "onnx")) == {
        "torch.nn",
        "gymnasium",
        "rsm_train.loop",
        "onnx",
    }
    assert {"a.b.cousin", "a.parent.thing"} <= names
    assert "gymnasium" not in imports(path, "a.b.module", top_level=True)
    assert "onnx" not in imports(path, "a.b.module", top_level=True)
    assert outside({"os.path", "torch.nn", "torchvision"}, ("torch",)) == {"torchvision"}
