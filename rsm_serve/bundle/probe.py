"""The probe of a bundle: recorded inputs and outputs, replayed when a policy is loaded."""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import BundleError
from rsm_common.spec import PolicySpec

PROBE_FILE = "probe.npz"
MAX_PROBE_BYTES = 2**26
"""Of one array of the probe."""


@dataclass(frozen=True)
class Probe:
    """Recorded inputs and outputs that a loaded graph must reproduce; P rows, all float32."""

    obs: NDArray[np.float32]
    """[P, O]"""
    noise: NDArray[np.float32]
    """[P, T, N, A]"""
    action: NDArray[np.float32]
    """[P, A]"""

    def to_bytes(self) -> bytes:
        """Return the content of probe.npz."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, obs=self.obs, noise=self.noise, action=self.action)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, spec: PolicySpec) -> Probe:
        """Parse probe.npz and check it against the specification.

        Raises:
            BundleError: not an npz file of plain arrays, or shapes or dtypes that are not the policy's.
        """
        wanted = {
            "obs": (spec.observation.size,),
            "noise": spec.noise_shape,
            "action": (spec.action.size,),
        }
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                arrays = {key: _read_array(archive, key, shape) for key, shape in wanted.items()}
        except BundleError:
            raise
        # zipfile, tokenize, ast and numpy raise many types of errors for damaged files: a nested header alone
        # can be a MemoryError, a TokenError, a TypeError or a RecursionError.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BundleError(
                f"{PROBE_FILE} must be an npz file of the plain arrays obs, noise and action ({reason:.200}); "
                "export the policy again"
            ) from None
        rows = len(arrays["obs"])
        for key, array in arrays.items():
            if len(array) != rows:
                raise _wrong_array(key, (rows, *wanted[key]), array.dtype, array.shape)
        return cls(**arrays)

    @classmethod
    def none(cls, spec: PolicySpec) -> Probe:
        """Return a probe without rows."""
        shapes = ((0, spec.observation.size), (0, *spec.noise_shape), (0, spec.action.size))
        return cls(*(np.zeros(shape, np.float32) for shape in shapes))


def _read_array(archive: zipfile.ZipFile, key: str, row_shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Read a float32 array [P, *row_shape], P >= 1, of an npz file.

    numpy's own reader allocates as much memory as an array's header declares. This one unpacks at most
    `MAX_PROBE_BYTES`, and checks that the header's size is that of the data.

    Raises:
        BundleError: another dtype or shape.
        Exception: various types, for a file that is no npz file of plain arrays.
    """
    with archive.open(f"{key}.npy") as file:
        content = file.read(MAX_PROBE_BYTES + 1)
    if len(content) > MAX_PROBE_BYTES:
        raise ValueError(f"{key} has more than {MAX_PROBE_BYTES} bytes")
    buffer = io.BytesIO(content)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(buffer))
    if read_header is None:
        raise ValueError(f"{key} is of an unknown version of the npy format")
    shape, fortran_order, dtype = read_header(buffer)
    if dtype.hasobject:
        raise ValueError(f"{key} holds Python objects")
    rows = shape[0] if shape else 0
    if dtype != np.float32 or shape != (rows, *row_shape) or rows < 1:
        raise _wrong_array(key, (rows, *row_shape), dtype, shape)
    data = buffer.read()
    if len(data) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{key} has {len(data)} bytes of data, which do not fit its shape {list(shape)}")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
    return array.astype(np.float32, order="C")


def _wrong_array(
    key: str, wanted: tuple[int, ...], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> BundleError:
    return BundleError(
        f"{PROBE_FILE}: wanted {key} as float32 {list(wanted)}, got {dtype} {list(shape)}; "
        "export the policy again"
    )
