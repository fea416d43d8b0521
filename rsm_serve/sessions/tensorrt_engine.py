"""TensorRT engines: built from the bundle's graph, kept in a cache, and refitted with new weights.

An engine belongs to one TensorRT version and one kind of GPU, and building takes seconds to minutes. The cache
therefore knows two keys. Under the key of the exact ONNX bytes lies an engine for just that file. Under the key
of the graph's structure, its weights left out, lies a refittable engine: a policy that was trained further,
with the same shapes, gets its weights without a build.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rsm_common.errors import BundleError, MissingExtraError, UsageError
from rsm_common.spec import PolicySpec
from rsm_serve.sessions.engine_cache import CACHE_FORMAT, EngineCache
from rsm_serve.sessions.onnx_structure import OnnxStructure, read_structure

logger = logging.getLogger(__name__)

MIN_VERSION = (10, 12)
"""Before it, strong typing did not cover what the exporter writes."""
BUILD_FLAGS = "strongly typed, refit individual, no tf32"
"""Part of the cache key: what `_build` asks of the builder apart from the profile."""

Origin = Literal["built", "cached", "refitted"]


@dataclass(frozen=True)
class Device:
    """The GPU that an engine is for; it does not run on another kind."""

    name: str
    capability: str
    """Compute capability, such as "9.0"."""


@dataclass(frozen=True)
class BatchRange:
    """The batch sizes of an optimization profile; tactics are timed at `opt`."""

    min: int
    opt: int
    max: int


def load_tensorrt() -> Any:
    """The tensorrt module.

    Raises:
        MissingExtraError: it is not installed, or its libraries are not.
        UsageError: it is too old.
    """
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "tensorrt"
        reason = "module tensorrt is missing" if missing else f"tensorrt is there, but does not load: {error}"
        raise MissingExtraError(
            f'the TensorRT backend needs: pip install "rsm-toolkit[serve-gpu]" ({reason})'
        ) from None
    if version_of(trt) < MIN_VERSION:
        raise UsageError(
            f"the TensorRT backend needs TensorRT {'.'.join(map(str, MIN_VERSION))} or newer, "
            f'got {trt.__version__}; upgrade it with: pip install -U "rsm-toolkit[serve-gpu]"'
        )
    return trt


def version_of(trt: Any) -> tuple[int, ...]:
    """(major, minor) of a tensorrt module."""
    return tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])


def input_shapes(spec: PolicySpec) -> dict[str, tuple[int, ...]]:
    """The inputs of a policy's graph without the batch axis."""
    return {"obs": (spec.observation.size,), "noise": spec.noise_shape}


def output_shapes(spec: PolicySpec) -> dict[str, tuple[int, ...]]:
    """The outputs of a policy's graph without the batch axis."""
    return {"action": (spec.action.size,), **({"q": ()} if spec.has_q else {})}


class EngineRecipe:
    """All that determines an engine.

    Args:
        trt: the tensorrt module.
        model: the content of model.onnx.
        spec: what the graph takes and gives.
        device: the GPU.
        batches: of the one optimization profile.
    """

    def __init__(self, trt: Any, model: bytes, spec: PolicySpec, device: Device, batches: BatchRange) -> None:
        self.trt = trt
        self.model = model
        self.spec = spec
        self.device = device
        self.batches = batches
        self.logger = _shared_logger(trt)
        self.model_sha256 = hashlib.sha256(model).hexdigest()
        try:
            self.structure = read_structure(model)
        except ValueError:
            # Not ours to diagnose: the parser says what is wrong, in its words.
            self.structure = OnnxStructure(self.model_sha256, ())

    @property
    def exact_key(self) -> str:
        """Cache key of an engine for exactly these ONNX bytes."""
        return self._key("exact", self.model_sha256)

    @property
    def structural_key(self) -> str:
        """Cache key of a refittable engine for any weights in this structure."""
        return self._key("structure", self.structure.digest)

    @property
    def timing_key(self) -> str:
        """Name of the timing cache: timings hold for a version of TensorRT and a GPU, whatever the graph."""
        parts = [self.trt.__version__, self.device.name, self.device.capability]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _key(self, kind: str, digest: str) -> str:
        batches = [self.batches.min, self.batches.opt, self.batches.max]
        parts = [CACHE_FORMAT, kind, digest, self.spec.precision, self.trt.__version__, self.device.name]
        parts += [self.device.capability, batches, input_shapes(self.spec), BUILD_FLAGS]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class OpenedEngine:
    """A deserialised engine and the objects that must outlive it."""

    engine: Any
    """tensorrt.ICudaEngine."""
    runtime: Any
    origin: Origin


def open_engine(recipe: EngineRecipe, cache_dir: Path) -> OpenedEngine:
    """Take the engine from the cache, refit one of the same structure, or build it.

    A cache that cannot be written costs a warning and the next start's time, not the service.

    Raises:
        BundleError: TensorRT cannot parse the graph or build an engine.
    """
    cache = EngineCache(cache_dir)
    opened = _from_cache(recipe, cache)
    if opened is not None:
        return opened
    with cache.locked() as writable:
        # Another process may have built it while this one waited.
        opened = _from_cache(recipe, cache) if writable else None
        return opened or _build_and_store(recipe, cache, writable=writable)


def _from_cache(recipe: EngineRecipe, cache: EngineCache) -> OpenedEngine | None:
    for key in (recipe.exact_key, recipe.structural_key):
        entry = cache.read(key)
        if entry is None:
            continue
        opened = _deserialize(recipe, entry.plan, "cached")
        if opened is None:
            logger.warning("TensorRT refuses the cached engine %s; it is built again", cache.path(key))
            cache.discard(key)
        elif entry.model_sha256 == recipe.model_sha256:
            return opened
        elif _refit(recipe, opened.engine):
            opened.origin = "refitted"
            return opened
    return None


def _build_and_store(recipe: EngineRecipe, cache: EngineCache, *, writable: bool) -> OpenedEngine:
    plan, refittable = _build(recipe, cache if writable else None)
    opened = _deserialize(recipe, plan, "built")
    if opened is None:
        raise BundleError(
            f"TensorRT {recipe.trt.__version__} cannot load the engine that it has just built for policy "
            f"{recipe.spec.name!r} ({recipe.logger.last_errors()}); check the driver and the GPU's free memory"
        )
    if writable:
        # An entry that is still there could not be refitted: it belongs to other weights and stays theirs.
        shared = refittable and not cache.path(recipe.structural_key).exists()
        cache.store(recipe.structural_key if shared else recipe.exact_key, plan, recipe.model_sha256)
    return opened


def _deserialize(recipe: EngineRecipe, plan: bytes, origin: Origin) -> OpenedEngine | None:
    runtime = _create(recipe, recipe.trt.Runtime)
    engine = runtime.deserialize_cuda_engine(plan)
    return None if engine is None else OpenedEngine(engine, runtime, origin)


def _build(recipe: EngineRecipe, cache: EngineCache | None) -> tuple[bytes, bool]:
    """(serialised engine, whether it can be refitted with all of the structure's weights)."""
    trt, name = recipe.trt, recipe.spec.name
    logger.info("building a TensorRT engine for policy %r on %s", name, recipe.device.name)
    recipe.logger.errors.clear()
    builder = _create(recipe, trt.Builder)
    network = _create_network(trt, builder)
    # The parser owns the weights' memory and nobody the timings: both must outlive the build.
    parser = _parse(recipe, network)
    config = builder.create_builder_config()
    # On by default, TF32 keeps 10 bits of a float32 factor; the bundle's precision is what it says.
    config.clear_flag(trt.BuilderFlag.TF32)
    refittable = _mark_refittable(recipe, network)
    if refittable:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    _add_profile(recipe, builder, config)
    timings = cache.read_timings(recipe.timing_key) if cache else b""
    timing_cache = _attach_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(
            f"TensorRT {trt.__version__} cannot build an engine for policy {name!r} "
            f"({recipe.logger.last_errors()}); use --backend onnxruntime or export the policy again"
        )
    if cache:
        _save_timings(config, cache, recipe.timing_key)
    del parser, timing_cache  # not before
    return bytes(plan), refittable


def _create(recipe: EngineRecipe, factory: Any) -> Any:
    try:
        return factory(recipe.logger)
    except TypeError as error:  # what the bindings make of a null pointer
        raise BundleError(
            f"TensorRT {recipe.trt.__version__} does not start on {recipe.device.name} "
            f"({recipe.logger.last_errors()}; {error}); check the driver"
        ) from None


def _create_network(trt: Any, builder: Any) -> Any:
    """Strongly typed: the graph's own types are obeyed."""
    if version_of(trt) >= (11,):
        return builder.create_network()
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def _parse(recipe: EngineRecipe, network: Any) -> Any:
    parser = recipe.trt.OnnxParser(network, recipe.logger)
    if not parser.parse(recipe.model):
        raise BundleError(
            f"TensorRT {recipe.trt.__version__} cannot parse the graph of policy {recipe.spec.name!r} "
            f"({_parser_errors(parser)}); export the policy again"
        )
    return parser


def _parser_errors(parser: Any) -> str:
    """All errors of an OnnxParser or OnnxParserRefitter, in the parser's words."""
    found = []
    for index in range(parser.num_errors):
        parser_error = parser.get_error(index)
        node = f"node {parser_error.node_name()!r} of {parser_error.node_operator()}: "
        found.append((node if parser_error.node_operator() else "") + parser_error.desc())
    return "; ".join(found) or "without a reason"


def _mark_refittable(recipe: EngineRecipe, network: Any) -> bool:
    """Mark what the structural key leaves out; False unless TensorRT knows all of it by name."""
    names = recipe.structure.weights
    unknown = [name for name in names if not network.mark_weights_refittable(name)]
    if unknown:
        logger.warning(
            "TensorRT cannot refit %s of policy %r; new weights will need a new build",
            ", ".join(unknown),
            recipe.spec.name,
        )
        for name in set(names).difference(unknown):
            network.unmark_weights_refittable(name)
    return bool(names) and not unknown


def _add_profile(recipe: EngineRecipe, builder: Any, config: Any) -> None:
    profile = builder.create_optimization_profile()
    sizes = (recipe.batches.min, recipe.batches.opt, recipe.batches.max)
    for name, shape in input_shapes(recipe.spec).items():
        profile.set_shape(name, *((size, *shape) for size in sizes))
    if config.add_optimization_profile(profile) < 0:
        raise BundleError(
            f"TensorRT {recipe.trt.__version__} refuses batch sizes {sizes} for policy {recipe.spec.name!r} "
            f"({recipe.logger.last_errors()}); export the policy again"
        )


def _attach_timings(config: Any, content: bytes) -> Any:
    """Use earlier timings; those of another device or version are refused by TensorRT and start empty."""
    for candidate in (content, b""):
        timing_cache = config.create_timing_cache(candidate)
        if timing_cache is not None and config.set_timing_cache(timing_cache, False):
            return timing_cache
    return None


def _save_timings(config: Any, cache: EngineCache, key: str) -> None:
    timing_cache = config.get_timing_cache()
    if timing_cache is not None:
        cache.write_timings(key, bytes(timing_cache.serialize()))


def _refit(recipe: EngineRecipe, engine: Any) -> bool:
    """Give a cached engine this model's weights; False if TensorRT cannot, and then the engine is spoilt."""
    trt = recipe.trt
    recipe.logger.errors.clear()
    try:
        refitter = trt.Refitter(engine, recipe.logger)
        # What the key left out and the engine does not take would stay as it was.
        unknown = set(recipe.structure.weights).difference(refitter.get_all_weights())
        parser_refitter = trt.OnnxParserRefitter(refitter, recipe.logger)
        if unknown:
            reason = f"it does not take {', '.join(sorted(unknown))}"
        elif not parser_refitter.refit_from_bytes(recipe.model):
            reason = _parser_errors(parser_refitter)
        elif not refitter.refit_cuda_engine():
            reason = recipe.logger.last_errors()
        else:
            return True
    except Exception as error:  # the bindings turn a failure in C++ into whatever fits
        reason = str(error)
    logger.warning("the cached TensorRT engine cannot be refitted (%s); a new one is built", reason)
    return False


@functools.cache
def _shared_logger(trt: Any) -> Any:
    """The one logger of this process: TensorRT keeps the first that it is given, and its errors go there."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Into Python's logging; TensorRT's own chatter is debug information."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=4)

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.errors.append(msg)
            logger.log(level, "TensorRT: %s", msg)

        def last_errors(self) -> str:
            return "; ".join(self.errors) or "without a reason"

    return Logger()
