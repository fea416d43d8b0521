"""The names of TensorRT's API: those that our source uses, and those that the real bindings have.

The bindings need NVIDIA's libraries to be imported. They are imported all the same, in a process of its own,
beside empty libraries of the same names: nothing can be run, but every class and every enumeration is the real
one. Where there is no C compiler, the strings in the bindings' shared object have to do.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# What the variables of our modules hold. A variable that is not named here is not checked, so test_tensorrt.py
# also wants every class of the fake to occur.
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "timing_cache": "ITimingCache",
    "refitter": "Refitter",
    "parser_refitter": "OnnxParserRefitter",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "severity": "ILogger.Severity",
}
MODULES = {"trt": "", "cuda": "cuda."}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
DUMP = """
import json, tensorrt_bindings as trt
found = {}
def walk(prefix, thing, depth):
    for name in dir(thing):
        if not name.startswith("_") or name == "__version__":
            value = getattr(thing, name)
            found[prefix + name] = (getattr(value, "__doc__", None) or "") if callable(value) else ""
            if isinstance(value, type) and depth:
                walk(prefix + name + ".", value, depth - 1)
walk("", trt, 2)
print(json.dumps(found))
"""


def used_names(source: str) -> set[str]:
    """What a module's source touches, as "BuilderFlag.TF32", "Builder.create_network" or "cuda.cudaMalloc"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = _resolve(node)
            if name is not None and not name.endswith("__init__"):
                found.add(name)
    # Of trt.BuilderFlag.TF32 the walk also meets trt.BuilderFlag: no harm, it has to exist as well.
    return found


def _resolve(node: ast.Attribute) -> str | None:
    base = node.value
    holder = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else None
    holder = holder.lstrip("_") if holder else None
    if holder in MODULES:
        return MODULES[holder] + node.attr
    if holder in OBJECTS:
        return f"{OBJECTS[holder]}.{node.attr}"
    outer = _resolve(base) if isinstance(base, ast.Attribute) else None
    return f"{outer}.{node.attr}" if outer else None


def bindings_file() -> Path | None:
    """The shared object of the real bindings, if they are installed."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("tensorrt.so")
    return path if path.is_file() else None


@functools.cache
def real_names() -> dict[str, str] | None:
    """Every public name of the real bindings with its docstring; None where they cannot be imported."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    path = bindings_file()
    if compiler is None or path is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
        for library in LIBRARIES:
            name = f"lib{library}.so.11"
            command = [
                compiler,
                "-shared",
                "-fPIC",
                f"-Wl,-soname,{name}",
                "-o",
                f"{folder}/{name}",
                str(source),
            ]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        output = subprocess.run(
            [sys.executable, "-c", DUMP],
            env={**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": str(path.parent.parent)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    if output.returncode != 0:
        return None
    names: dict[str, str] = json.loads(output.stdout.splitlines()[-1])
    return names


def missing_strings(names: set[str], path: Path) -> set[str]:
    """The names whose last part is not the end of any string in a file."""
    content = path.read_bytes()
    return {name for name in names if name.rsplit(".", 1)[-1].encode() + b"\0" not in content}
