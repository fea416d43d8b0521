"""The same graph behind PyTriton, as its documentation shows it; started by `serving.py`.

    PYTHON benchmarks/peers/pytriton_server.py --model model.onnx --noise T,N,A

PYTHON is of an environment with nvidia-pytriton and onnxruntime. Batches without an artificial wait. Prints
"address=HOST:PORT".
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from graph import arguments, free_port, open_graph
from pytriton.decorators import batch  # type: ignore[import-not-found]
from pytriton.model_config import (  # type: ignore[import-not-found]
    DynamicBatcher,
    ModelConfig,
    Tensor,
)
from pytriton.triton import Triton, TritonConfig  # type: ignore[import-not-found]


def main() -> None:
    options = arguments(__doc__)
    graph = open_graph(options)

    @batch  # type: ignore[untyped-decorator]
    def infer(obs: Any) -> dict[str, Any]:
        return {"action": graph.act(obs)}

    http_port, grpc_port = free_port(), free_port()
    where = {"http_address": "127.0.0.1", "grpc_address": "127.0.0.1"}
    config = TritonConfig(**where, http_port=http_port, grpc_port=grpc_port, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="policy",
            infer_func=infer,
            inputs=[Tensor(name="obs", dtype=np.float32, shape=(graph.obs_size,))],
            outputs=[Tensor(name="action", dtype=np.float32, shape=(graph.action_size,))],
            config=ModelConfig(options.max_batch_size, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.run()
        print(f"address=127.0.0.1:{grpc_port}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
