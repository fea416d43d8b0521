"""Follows the repository: compares what it holds with what is loaded, and loads and unloads the difference."""

from __future__ import annotations

import logging

from rsm_common.errors import BundleError
from rsm_serve.bundle.repository import Survey, survey
from rsm_serve.engine.background import in_thread
from rsm_serve.engine.versions import Memory, Versions

logger = logging.getLogger(__name__)


class Follower:
    """Brings the loaded versions to where the repository wants them.

    Args:
        versions: what is loaded.
    """

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self._problem = ""

    async def look(self) -> None:
        """Look at the repository once, and load and unload what it says; failures are logged."""
        versions = self._versions
        asked = [(name, version) for name, memory in versions.memory.items() for version in memory.failed]
        try:
            found = await in_thread(lambda: survey(versions.repository, asked))
        except BundleError as error:  # a volume that is gone for a moment must not empty the server
            if self._problem != str(error):
                self._problem = str(error)
                logger.error("%s; what is loaded goes on", error)
            return
        self._problem = ""
        for name in {*versions.memory, *found.policies}:
            versions.memory[name].found = found.policies.get(name)
        for name in sorted({*found.policies, *versions.registry.names, *(name for name, _ in asked)}):
            if versions.stopping:
                return
            await self._follow(name, found)

    async def _follow(self, name: str, survey: Survey) -> None:
        """Bring one policy to where the repository wants it."""
        versions, memory = self._versions, self._versions.memory[name]
        wishes, found = versions.wishes, memory.found
        current = wishes.current(name, found)
        # A version that was asked for and is not there stays among the failures.
        there = {*(found.versions if found else ()), *wishes.fixed(name)}
        versions.forget_failures(name, there if current is None else there | {current})
        if found is None:
            self._follow_vanished(name, memory)
            return
        memory.missing = False
        if found.problem:
            _log_once(memory, f"policy {name!r} stays as it is: {found.problem}")
            return
        memory.problem = ""
        if not wishes.follows(name) and not wishes.fixed(name):
            return
        missing = ({current} | wishes.fixed(name)) - {None} - versions.registry.ready(name)
        # The current one first, because requests wait for it.
        for version in sorted(filter(None, missing), key=lambda number: (number != current, number)):
            # A version that failed is tried again when its files have changed, not before.
            if version not in memory.failed or memory.failed[version] != survey.stamps.get((name, version)):
                await versions.bring(name, version, make_current=version == current)
        versions.settle(name, current)

    def _follow_vanished(self, name: str, memory: Memory) -> None:
        versions = self._versions
        if not versions.wishes.follows(name) or name in versions.wishes.names():
            if versions.registry.ready(name):
                _log_once(memory, f"policy {name!r} is no longer in the repository; what is loaded goes on")
        elif not memory.missing:  # a directory that is being moved or remounted is there at the next look
            memory.missing = True
        else:
            memory.missing = False
            memory.problem = ""
            versions.drop(name, "it is no longer in the repository")


def _log_once(memory: Memory, sentence: str) -> None:
    if memory.problem != sentence:
        memory.problem = sentence
        logger.error("%s", sentence)
