"""What removing empty channels gains: whole networks pruned group by group, exported dense, compact and op.

    python benchmarks/shrink.py --network vgg19 resnet18 --density .3 --empty .25 --batch 1 32 --threads 1

Every convolution but the first keeps the given share of its groups K(i, j, s, :), drawn at random from a seed, those in
the middle of the kernel first, as training tends to; a share of its input maps keeps none, as in the VGG network of
Lebedev & Lempitsky (2016), section 5.2, where 29 of 64 maps were empty. Weights are random, batch norms hold the
statistics of random images.

`"compact"` is TensorFlow on the network without the channels that nothing reads, `"op"` the same network with the
thinned convolutions where they win. The exports take turns in one process on rotating inputs, medians are compared.
Outputs are checked against the dense export's.
"""

import argparse
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import common
import networks
import networks_zoo
import numpy as np

BACKENDS = ("dense", "compact", "op")


def patterns(empty):
    """Return the function that draws the masks of a layer's groups: (shape, density, generator) -> mask."""

    def draw(shape, density, generator):
        height, width, inputs, _ = shape
        y, x = np.mgrid[:height, :width]
        distance = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2)
        scores = generator.standard_normal((height * width, inputs)) - distance.reshape(-1, 1)
        scores[:, generator.permutation(inputs)[: round(empty * inputs)]] = -np.inf
        keep = min(max(1, round(density * scores.size)), np.isfinite(scores).sum())
        mask = np.zeros(scores.size, "float32")
        mask[np.argsort(-scores, axis=None, kind="stable")[:keep]] = 1
        return mask.reshape(shape)

    return draw


def measure(name, options):
    """Export one network with each backend and time the exports; return the results of this network."""
    import keras

    import keras_sparse as ks
    from keras_sparse.engine import timing

    keras.backend.clear_session()
    network = networks_zoo.NETWORKS[name]
    draw = patterns(options.empty)
    model = networks.sparse_network(network, options.density, options.seed, granularity="group", draw=draw)
    small = ks.shrink(model)
    counts = {"before": ks.count(model)["total"], "after": ks.count(small)["total"]}
    result = {
        key: {when: total[key] for when, total in counts.items()} for key in ("params", "nnz", "madds", "connections")
    }
    # What a dense convolution computes, zeros included.
    result["dense_madds"] = {
        when: ks.count(ks.sparsify(ks.strip(net)))["total"]["madds"]
        for when, net in (("before", model), ("after", small))
    }
    images = np.random.default_rng(1).standard_normal((4, *network.input_shape)).astype("float32")
    with tempfile.TemporaryDirectory() as folder:
        exports, outputs = {}, {}
        for backend in BACKENDS:
            networks.say(f"{name}: exporting {backend}")
            path = pathlib.Path(folder) / backend
            plan = ks.export(model, path, backend, batch_size=options.batch, verbose=False)
            exports[backend] = ks.load(path)
            outputs[backend] = exports[backend](images).numpy()
            result.setdefault("bytes", {})[backend] = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            result.setdefault("routines", {})[backend] = {p: layer["routine"] for p, layer in plan["layers"].items()}
        scale = np.abs(outputs["dense"]).max()
        result["error"] = {b: float(np.abs(outputs[b] - outputs["dense"]).max() / scale) for b in BACKENDS}
        assert max(result["error"].values()) < networks.TOLERANCE, result["error"]
        result["milliseconds"] = {
            batch: {
                backend: 1e3 * seconds
                for backend, seconds in timing.alternate(
                    exports, [(batch, *network.input_shape)], repeats=options.repeats, budget=10.0
                ).items()
            }
            for batch in options.batch
        }
    return result


def table(results):
    """Return the lines of the table, in Markdown."""
    lines = [
        "| network | params | MAdds, zeros included | batch | dense, ms | compact | op |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        cells = [
            f"{result[key]['before'] / 1e6:.2f} M → {result[key]['after'] / 1e6:.2f} M"
            for key in ("params", "dense_madds")
        ]
        for batch, by_backend in result["milliseconds"].items():
            dense = by_backend["dense"]
            times = [f"{by_backend[b]:.2f} ({dense / by_backend[b]:.2f}x)" for b in BACKENDS[1:]]
            lines.append(f"| {name} | {' | '.join(cells)} | {batch} | {dense:.2f} | {' | '.join(times)} |")
    return lines


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["vgg19"], choices=sorted(networks_zoo.NETWORKS))
    parser.add_argument("--density", type=float, default=0.3, help="share of the groups that is kept")
    parser.add_argument("--empty", type=float, default=0.25, help="share of the input maps without any group")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for all results")
    options = parser.parse_args(arguments)
    for name in ("density", "empty"):
        if not 0 <= getattr(options, name) <= 1:
            parser.error(f"--{name} must lie in [0, 1]. Received: {getattr(options, name)}")

    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    busy = common.busy_cores()
    results = {}
    for name in options.network:
        results[name] = measure(name, options)
        if options.json:
            common.write_result(options.json, {"busy_cores": busy, "networks": results})
    print("\n".join(table(results)))
    if busy:
        networks.say(f"{busy} cores were busy with something else before.")
    return results


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
