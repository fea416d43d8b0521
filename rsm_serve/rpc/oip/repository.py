"""The methods of the Open Inference Protocol that list, load and unload policies."""

from __future__ import annotations

from collections.abc import Mapping

from rsm_common.errors import InvalidRequestError, NotOfferedError, RepositoryError, RequestError, RsmError
from rsm_serve.engine.lifecycle import RepositoryControl
from rsm_serve.engine.registry import Registry
from rsm_serve.pb import oip_pb2 as pb
from rsm_serve.rpc.status import Context, abort
from rsm_serve.rpc.streams import SHUTTING_DOWN, OpenStreams
from rsm_serve.security.access import GRANT, Role

READY = "READY"
MAX_VERSION_DIGITS = 19

SWITCHED_OFF = (
    "loading and unloading policies is switched off; start rsm-serve with an admin token (--admin-token-file)"
)
NOT_LOADED = "did not load; the server's log, and an admin, can say why"
"""Replaces a reason that may name files of the server."""


class RepositoryMethods:
    """RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload.

    Args:
        registry: the loaded policies.
        control: loads and unloads; None: both are switched off.
        streams: the open streams of the service; while they drain, no policy is ready.
    """

    def __init__(self, registry: Registry, control: RepositoryControl | None, streams: OpenStreams) -> None:
        self._registry = registry
        self._control = control
        self._streams = streams

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """Policies and versions, and the state of each."""
        try:
            _check_repository(request.repository_name)
        except RequestError as error:
            await abort(context, error)
        entries = self._loaded() if self._control is None else self._control.index()
        grant = GRANT.get()
        hidden = grant is not None and grant.role is not Role.ADMIN
        response = pb.RepositoryIndexResponse()
        for name, version, state, reason in entries:
            if self._control is not None and reason and hidden:
                reason = NOT_LOADED
            if state == READY or not request.ready:
                response.models.add(name=name, version=version, state=state, reason=reason)
        return response

    async def RepositoryModelLoad(  # noqa: N802
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load a version of a policy."""
        try:
            control = self._controlled(request.repository_name)
            await control.load(request.model_name, _version_to_load(request.parameters))
        except Exception as error:
            await abort(context, _told_to_admin(error))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload all versions of a policy."""
        try:
            await self._controlled(request.repository_name).unload(request.model_name)
        except Exception as error:
            await abort(context, _told_to_admin(error))
        return pb.RepositoryModelUnloadResponse()

    def _loaded(self) -> list[tuple[str, str, str, str]]:
        state, reason = ("UNAVAILABLE", SHUTTING_DOWN) if self._streams.draining else (READY, "")
        return [(lane.spec.name, lane.spec.version, state, reason) for lane in self._registry.lanes]

    def _controlled(self, repository_name: str) -> RepositoryControl:
        if self._control is None:
            raise NotOfferedError(SWITCHED_OFF)
        _check_repository(repository_name)
        return self._control


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequestError(
            f"wanted no repository_name, because there is one repository, got {name!r:.60}; leave it empty"
        )


def _version_to_load(parameters: Mapping[str, pb.ModelRepositoryParameter]) -> int | None:
    """The parameter `version`, None if it is not there."""
    if others := sorted(set(parameters) - {"version"}):
        raise InvalidRequestError(
            f"wanted no parameter but version, got {', '.join(others):.60}; a bundle brings its own files and "
            "configuration, publish another version instead"
        )
    if "version" not in parameters:
        return None
    kind = parameters["version"].WhichOneof("parameter_choice")
    text = str(getattr(parameters["version"], kind)) if kind in ("int64_param", "string_param") else ""
    if not (text.isascii() and text.isdecimal() and len(text) < MAX_VERSION_DIGITS and int(text) > 0):
        raise InvalidRequestError(f"wanted a number such as 3 as version, got {text!r:.60}; or leave it out")
    return int(text)


def _told_to_admin(error: Exception) -> Exception:
    """The error as an admin sees it, who may know what is wrong with a bundle."""
    known = isinstance(error, RsmError) and not isinstance(error, RequestError)
    return RepositoryError(str(error)) if known else error
