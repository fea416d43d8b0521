"""Canaries: versions that get a share of the requests that name no version."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rsm_common.errors import BundleError, ConfigError
from rsm_serve.bundle.contract import check_policy_name

_TEXT = re.compile(r"([^:=]+):([1-9][0-9]{0,8})=([0-9]+(?:\.[0-9]+)?)%")


@dataclass(frozen=True)
class Canary:
    """One version that gets a share of a policy's requests."""

    name: str
    version: int
    share: float
    """Share of the requests, from 0 to 1."""

    @classmethod
    def parse(cls, text: str) -> Canary:
        """Parse NAME:VERSION=PERCENT%.

        Raises:
            ConfigError: the text has another form, or more than 100 %.
        """
        match = _TEXT.fullmatch(text)
        try:
            name = check_policy_name(match[1] if match else "")
        except BundleError:
            match = None
        if match is None or not 0 < float(match[3]) <= 100:
            raise ConfigError(f"wanted NAME:VERSION=PERCENT% such as pendulum:4=10%, got {text!r:.80}")
        return cls(name, int(match[2]), float(match[3]) / 100)

    def __str__(self) -> str:
        return f"{self.name}:{self.version}={100 * self.share:g}%"


def check_shares(canaries: Iterable[Canary]) -> None:
    """Check that the canaries of each policy fit together.

    Raises:
        ConfigError: a version twice, or more than 100 % in all.
    """
    shares: dict[str, float] = {}
    seen: set[tuple[str, int]] = set()
    for canary in canaries:
        shares[canary.name] = shares.get(canary.name, 0.0) + canary.share
        if (canary.name, canary.version) in seen or shares[canary.name] > 1 + 1e-9:
            raise ConfigError(
                f"wanted each version once and at most 100 % in all as --canary of policy {canary.name!r}, "
                f"got {canary} too; leave it out or lower a share"
            )
        seen.add((canary.name, canary.version))


def lot(name: str, client_id: str, seed: int | None) -> float:
    """Return the number in [0, 1) that decides which version a request goes to.

    It is a hash of the policy's name and the client_id, the same in every process. Without a client_id it is a
    hash of the name and the seed, so that a repeated request goes to the same version. Without both it is
    random.
    """
    if client_id:
        key = f"{name}\0client\0{client_id}"
    elif seed is not None:
        key = f"{name}\0seed\0{seed}"
    else:
        return random.random()
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose(canaries: Sequence[Canary], lot: float) -> int | None:
    """Return the version that a request goes to; None for the current version.

    A larger share of the last canary moves clients to it and none away from it.
    """
    for canary in canaries:
        if lot < canary.share:
            return canary.version
        lot -= canary.share
    return None
