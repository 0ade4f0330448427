"""A step of training with the sparse routines beside the same step with the dense convolution.

    python benchmarks/training.py --density 1 .5 .3 .1 .05 --batch 32 --json training.json

Two copies of an all-convolutional network for 32x32 images, one of them with `execution = "auto"` in its layers and
one with `"dense"`, train on the same batches in the same process, step by step in turn. A step is
`model.train_on_batch`: forward, backward, optimizer, metrics. Masks change from one density to the next, and nothing
is traced again. The weights of both are compared after each density's first step. The ratio is dense time by sparse
time, medians of the wall clock: above 1, sparse wins. Beside it stands the ratio of the CPU times, which others on the
machine disturb less.
"""

import argparse
import math
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import common


def network(args, execution):
    """Return a compiled model: blocks of two convolutions, the first of each but the first with stride 2."""
    import keras

    import keras_sparse as ks

    keras.utils.set_random_seed(args.seed)
    layers = [keras.Input((32, 32, 3))]
    for block, filters in enumerate(args.filters):
        for stride in (1 if block == 0 else 2, 1):
            layers.append(
                ks.layers.SparseConv2D(
                    filters,
                    args.kernel_size,
                    strides=stride,
                    padding="same",
                    activation="relu",
                    kernel_initializer="he_normal",
                    granularity=args.granularity,
                )
            )
            layers[-1].execution = execution
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.get({"class_name": args.optimizer, "config": {"learning_rate": 1e-3}}), loss)
    return model


def sparse_layers(model):
    # Three input channels are not worth pruning: the first layer stays as it is.
    return [layer for layer in model.layers if hasattr(layer, "execution")][1:]


def prune(models, density, seed):
    """Give the layers of all models the same random masks."""
    import numpy as np

    generator = np.random.default_rng(seed)
    for layers in zip(*map(sparse_layers, models)):
        units = math.prod(layers[0].mask.shape)
        mask = np.zeros(units, "float32")
        mask[generator.permutation(units)[: max(1, round(units * density))]] = 1
        for layer in layers:
            layer.assign_mask(mask.reshape(layer.mask.shape))


def largest_difference(models):
    """Return the largest difference between weights, relative to the largest of the variable."""
    import numpy as np

    pairs = zip(*(model.get_weights() for model in models))
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)


def run(args):
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    import keras_sparse as ks

    if not ks.ops.is_available():
        raise SystemExit("The compiled ops are missing: there is nothing to compare.")
    print(f"{args.threads} thread(s), {args.granularity}, filters {args.filters}, {args.optimizer}")
    print(f"{'batch':>5s} {'density':>7s} {'dense ms':>9s} {'sparse ms':>9s} {'ratio':>6s} {'CPU ratio':>9s}")
    generator = np.random.default_rng(args.seed)
    records = []
    for batch in args.batch:
        models = {"sparse": network(args, args.execution), "dense": network(args, "dense")}
        x = generator.standard_normal((batch, 32, 32, 3)).astype("float32")
        y = generator.integers(0, 10, batch)
        for density in args.density:
            models["sparse"].set_weights(models["dense"].get_weights())
            models["sparse"].optimizer.build(models["sparse"].trainable_variables)
            models["dense"].optimizer.build(models["dense"].trainable_variables)
            for ours, theirs in zip(models["sparse"].optimizer.variables, models["dense"].optimizer.variables):
                ours.assign(theirs)
            prune(models.values(), density, args.seed)
            for model in models.values():
                model.train_on_batch(x, y)
            error = largest_difference(models.values())
            # One step of Adam may move a weight whose gradient is almost zero either way.
            if not error < 0.1:
                raise SystemExit(f"At density {density} the weights differ by {error:.1e} after a step")
            times = {name: [] for name in models}
            started = time.perf_counter()
            while len(times["dense"]) < args.repeats or time.perf_counter() - started < args.budget:
                # In alternating order, as the first of a round finds another state of the caches.
                for name in sorted(models, reverse=len(times["dense"]) % 2 == 1):
                    model = models[name]
                    wall, cpu = time.perf_counter(), time.process_time()
                    model.train_on_batch(x, y)
                    times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
            record = {
                "batch": batch,
                "density": density,
                "threads": args.threads,
                "granularity": args.granularity,
                "dense_ms": medians["dense"][0] * 1e3,
                "sparse_ms": medians["sparse"][0] * 1e3,
                "ratio": medians["dense"][0] / medians["sparse"][0],
                "dense_cpu_ms": medians["dense"][1] * 1e3,
                "sparse_cpu_ms": medians["sparse"][1] * 1e3,
                "cpu_ratio": medians["dense"][1] / medians["sparse"][1],
                "steps": len(times["dense"]),
                "largest_relative_difference": error,
            }
            records.append(record)
            print(
                f"{batch:5d} {density:7.3f} {record['dense_ms']:9.2f} {record['sparse_ms']:9.2f} "
                f"{record['ratio']:6.2f} {record['cpu_ratio']:9.2f}",
                flush=True,
            )
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, nargs="+", default=[1.0, 0.5, 0.3, 0.1, 0.05])
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--filters", type=int, nargs="+", default=[64, 128, 256], help="of each block")
    parser.add_argument("--kernel-size", type=int, default=3)
    parser.add_argument("--granularity", default="connection", help="of the masks")
    parser.add_argument("--execution", default="auto", choices=("auto", "sparse"))
    parser.add_argument("--optimizer", default="Adam")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="steps of each model, at least")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for a density, roughly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the records")
    args = parser.parse_args()
    if not all(0 < density <= 1 for density in args.density):
        parser.error(f"--density must lie in (0, 1], received {args.density}")
    if min(args.batch) < 1 or args.threads < 1 or min(args.filters) < 1:
        parser.error("--batch, --threads and --filters must be at least 1")
    records = run(args)
    if args.json:
        common.write_result(args.json, {"records": records})


if __name__ == "__main__":
    main()
