"""The sources of a policy: a training run, a checkpoint, a bundle or a running server."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from rsm_common.commandline import require_extra
from rsm_common.errors import UsageError
from rsm_common.manifest import MANIFEST_FILE
from rsm_common.policy import Policy
from rsm_eval.learning import CONFIG_FILE
from rsm_eval.rollout import MAX_BATCH_ROWS
from rsm_serve.bundle.contract import MODEL_SUFFIX, list_policies, list_versions
from rsm_serve.sessions.choice import require_backend

Kind = Literal["torch", "bundle", "server"]

SERVER_TIMEOUT_S = 30.0
"""Deadline of a call to a server: generous, since a measurement must see slow answers too."""

_WANTED = (
    "wanted a run directory, a checkpoint, a bundle directory, a model.onnx of rsm-export, "
    "grpc://host:port/name or grpc:unix:path/name"
)
_NAME = r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?::(?P<version>[1-9][0-9]*))?"
_TCP = re.compile(rf"(?P<address>grpcs?://[^/]+:[0-9]+)/{_NAME}")
_UNIX = re.compile(rf"grpc:(?P<address>unix:.*[^/])/{_NAME}")


@dataclass(frozen=True)
class OpenedPolicy:
    """A policy that is ready to act, and what is known of its source. Close it, or use it in a `with`."""

    source: str
    """As the user wrote it."""
    kind: Kind
    policy: Policy
    run_dir: Path | None = None
    """The training run that a torch policy belongs to."""
    max_batch_rows: int = MAX_BATCH_ROWS
    """Most observations that one call may carry."""
    runtime: str | None = None
    """The runtime of a bundle: "onnxruntime 1.31.1, CPU"."""
    close: Callable[[], None] = lambda: None
    """Releases what the policy holds."""

    def __enter__(self) -> OpenedPolicy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_policy(source: str, backend: str = "auto") -> OpenedPolicy:
    """Open a policy by its source.

    Args:
        source: a run directory or a checkpoint of rsm-train; a bundle (a policy directory, which means
            its current version, or a version directory); a bare model.onnx of rsm-export;
            grpc://host:port/name[:version], with TLS grpcs://..., or grpc:unix:path/name[:version]; see
            `rsm_serve.client.PolicyClient` for certificates and tokens.
        backend: what is to run a bundle, see `rsm_serve.sessions.choice`; other sources ignore it.

    Raises:
        UsageError: none of these.
        CheckpointError, BundleError: the directory is damaged.
        RequestError: the server does not answer or has no such policy.
        MissingExtraError: what the source needs is not installed.
    """
    if source.startswith(("grpc:", "grpcs:")):
        return _open_server(source)
    try:
        kind = _kind(source)
    except OSError as error:
        raise UsageError(
            f"cannot read {source!r}: {error.strerror}; make it readable for this user, or name another path"
        ) from None
    return _open_checkpoint(source) if kind == "torch" else _open_bundle(source, backend)


def _kind(source: str) -> Kind:
    """What a path holds."""
    path = Path(source)
    if path.suffix == MODEL_SUFFIX and path.is_file():
        return "bundle"
    if not path.is_dir():
        found = "a file of another kind" if path.exists() else "not there"
        raise UsageError(f"{_WANTED}, got {source!r}, which is {found}; check the spelling")
    if (path / MANIFEST_FILE).is_file() or list_versions(path):
        return "bundle"
    if (path / CONFIG_FILE).is_file():
        return "torch"
    raise UsageError(f"{_WANTED}, got {source!r}, {_describe(path)}")


def run_dir_of(checkpoint: Path) -> Path | None:
    """The run directory of a run directory or of one of its checkpoints; None if there is none."""
    resolved = checkpoint.resolve()
    for candidate in (resolved, resolved.parent.parent):
        if (candidate / "checkpoints").is_dir():
            return candidate
    return None


def _describe(path: Path) -> str:
    policies = list_policies(path)
    if policies:
        return f"a repository of bundles; name one of them, such as {path / policies[0]}"
    found = sorted(file.parent for file in path.glob(f"*/{CONFIG_FILE}"))
    if found:
        return f"a directory of runs or checkpoints; name one of them, such as {found[-1]}"
    return (
        f"a directory with neither {CONFIG_FILE} (a run) nor {MANIFEST_FILE} or versions (a bundle); "
        "a run that was just started has nothing to evaluate yet"
    )


def _open_checkpoint(source: str) -> OpenedPolicy:
    require_extra("evaluating a checkpoint", "train", ["torch", "safetensors"])
    # Evaluation of bundles and servers must work where nothing can train.
    import torch

    from rsm_train.run.checkpoint import load_torch_policy

    torch.set_num_threads(1)  # as the sessions: acting is too small to share, and the simulator needs cores

    path = Path(source)
    return OpenedPolicy(source, "torch", load_torch_policy(path), run_dir_of(path))


def _open_bundle(source: str, backend: str) -> OpenedPolicy:
    require_backend("evaluating a bundle", backend)
    from rsm_serve import local

    policy = local.open_policy(source, backend)
    return OpenedPolicy(source, "bundle", policy, runtime=policy.runtime, close=policy.close)


def _open_server(source: str) -> OpenedPolicy:
    match = _TCP.fullmatch(source) or _UNIX.fullmatch(source)
    if match is None:
        raise UsageError(
            "wanted a server as grpc://host:port/name, with TLS grpcs://host:port/name, or grpc:unix:path/name "
            f"(name or name:version), got {source!r}; rsm-serve prints its address and the names of its "
            "policies when it starts"
        )
    from rsm_serve.client import PolicyClient

    client = PolicyClient(match["address"], match["name"], match["version"], timeout_s=SERVER_TIMEOUT_S)
    rows = min(MAX_BATCH_ROWS, client.max_batch_size)
    return OpenedPolicy(source, "server", client, max_batch_rows=rows, close=client.close)
