"""The graph that the peers serve, in onnxruntime on one thread. Does not import the toolkit."""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime


class Graph:
    """The exported chain."""

    def __init__(self, path: str, noise_shape: tuple[int, ...]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._noise_shape = noise_shape
        self._generator = np.random.default_rng()
        self.obs_size, self.action_size = (
            tensor.shape[1] for tensor in (self._session.get_inputs()[0], self._session.get_outputs()[0])
        )

    def act(self, obs_BO: Any) -> Any:
        """[B, A]."""
        noise_BTNA = self._generator.standard_normal((len(obs_BO), *self._noise_shape), dtype=np.float32)
        return self._session.run(["action"], {"obs": obs_BO, "noise": noise_BTNA})[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def arguments(doc: str | None) -> argparse.Namespace:
    """Command line arguments of both peers."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--noise", required=True, help="T,N,A")
    parser.add_argument("--max-batch-size", type=int, default=64)
    return parser.parse_args()


def open_graph(options: argparse.Namespace) -> Graph:
    """Open the graph that the command line names."""
    return Graph(options.model, tuple(map(int, options.noise.split(","))))
