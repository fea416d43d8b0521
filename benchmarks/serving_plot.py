"""Draw latency against load from the JSON of `serving.py`.

python benchmarks/serving_plot.py benchmarks/results/serving.json docs/images/latency_load.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

COLOURS = {
    "rsm-serve, stream": "#0b6e4f",
    "rsm-serve, unary": "#3fa34d",
    "rsm-serve, Open Inference Protocol": "#9bc53d",
    "PyTriton": "#c1440e",
    "LitServe": "#6a4c93",
}
TICKS = (200, 500, 1000, 2000, 5000)


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    curves = json.loads(source.read_text())["load"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True, layout="constrained")
    for axis, percentile in zip(axes, ("p50", "p99"), strict=True):
        for name, curve in curves.items():
            points = [
                (run["per_s"], run[f"{percentile}_us"] / 1000) for run in curve["open_loop"] if run["answers"]
            ]
            axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name, markersize=4)
        axis.set(xscale="log", yscale="log", xlabel="requests per second", title=percentile)
        axis.set_xticks(TICKS, map(str, TICKS))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(which="both", alpha=0.2)
    axes[0].set_ylabel("latency from when it was due, ms")
    axes[0].legend(fontsize=8)
    figure.suptitle("One graph (T = 20, N = 1), open loop of random arrivals, two shared cores")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
