"""The same graph behind LitServe, as its documentation shows it; started by `serving.py`.

    PYTHON benchmarks/peers/litserve_server.py --model model.onnx --noise T,N,A

PYTHON is of an environment with litserve and onnxruntime. Batches without an artificial wait. Prints
"address=URL".
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import litserve  # type: ignore[import-not-found]
import numpy as np
from graph import Graph, arguments, free_port, open_graph


class PolicyAPI(litserve.LitAPI):  # type: ignore[misc]
    """JSON with "obs" in, with "action" out."""

    def __init__(self, graph_options: Any) -> None:
        super().__init__(max_batch_size=graph_options.max_batch_size, batch_timeout=0)
        self._graph_options = graph_options

    def setup(self, device: str) -> None:
        self._graph: Graph = open_graph(self._graph_options)

    def decode_request(self, request, **kwargs):  # type: ignore[no-untyped-def]  # it reads the annotations
        return np.array(request["obs"], np.float32)

    def batch(self, inputs: list[Any]) -> Any:
        return np.stack(inputs)

    def predict(self, obs_BO: Any) -> Any:
        return self._graph.act(obs_BO)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"action": output.tolist()}


def announce(port: int) -> None:
    """Say where it serves once it does."""
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    print(f"address=http://127.0.0.1:{port}/predict", flush=True)


def main() -> None:
    server = litserve.LitServer(PolicyAPI(arguments(__doc__)), accelerator="cpu", workers_per_device=1)
    port = free_port()
    threading.Thread(target=announce, args=(port,), daemon=True).start()
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="error")


if __name__ == "__main__":
    main()
