"""Sparse convolution ops beside TensorFlow's dense ones, layer by layer.

    python benchmarks/conv_ops.py --layers benchmarks/layers/survey.csv --density .1 .05 --batch 1 8 64 --json out.json

Both run in the same process, turn by turn, on rotating inputs, each several times within one graph; medians are
compared. TensorFlow gets its filter once as a constant and once as a variable, and its faster time counts. Every
sparse result is checked against the dense one before it is timed. The ratio is dense time by sparse time: above 1,
sparse wins.

A list of layers is a CSV file with the columns name, height, width, in_channels, out_channels, kernel_height,
kernel_width, stride, dilation, padding.
"""

import argparse
import csv
import gc
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import common

INTEGERS = ("height", "width", "in_channels", "out_channels", "kernel_height", "kernel_width", "stride", "dilation")


def read_layers(path):
    with open(path, newline="", encoding="utf-8") as file:
        layers = list(csv.DictReader(file))
    for layer in layers:
        missing = {"name", "padding", *INTEGERS} - {key for key, value in layer.items() if value}
        if missing:
            raise SystemExit(f"{path}: layer {layer.get('name')!r} lacks {sorted(missing)}")
        layer.update({key: int(layer[key]) for key in INTEGERS})
    return layers


def random_kernel(layer, density, routine, generator):
    """Return a kernel with exactly the given share of connections, or of groups for the thinned routine."""
    import numpy as np

    taps = (layer["kernel_height"], layer["kernel_width"])
    shape = (*taps, layer["in_channels"], layer["out_channels"])
    unit = (1, 1, *shape[2:]) if routine == "connection" else (*shape[:3], 1)
    units = math.prod(unit)
    mask = np.zeros(units, "float32")
    mask[generator.permutation(units)[: max(1, round(units * density))]] = 1
    return generator.standard_normal(shape).astype("float32") * mask.reshape(unit)


class Cell:
    """One layer at one density and batch size: the dense and the sparse functions to time."""

    def __init__(self, layer, density, batch, routine, generator):
        import tensorflow as tf

        from keras_sparse.engine import packing

        self.kernel = random_kernel(layer, density, routine, generator)
        self.strides, self.dilations = [layer["stride"]] * 2, [layer["dilation"]] * 2
        self.padding = layer["padding"].upper()
        self.routine = routine
        self.input_shape = (batch, layer["height"], layer["width"], layer["in_channels"])
        self.variable = tf.Variable(self.kernel)
        if routine == "connection":
            self.packed = packing.connection_table(self.kernel)
        else:
            self.packed = packing.thinned_filter(self.kernel)
        # Made once, as the dense filter is: the copies of an op in one graph share them.
        self.values = tf.Variable(self.packed.filter)
        if routine == "connection":
            self.table = (tf.constant(self.packed.row_splits), tf.constant(self.packed.input_channels))
        else:
            self.table = (tf.constant(self.packed.indices),)
        self.output_shape = tuple(self.dense_forward(tf.zeros(self.input_shape), self.kernel).shape)
        positions = math.prod(self.output_shape[:3])
        self.flops = 2 * positions * self.packed.filter.size

    def _dense_options(self):
        return {
            "strides": [1, *self.strides, 1],
            "padding": self.padding,
            "dilations": [1, *self.dilations, 1],
        }

    def _sparse_options(self):
        options = {
            "strides": self.strides,
            "padding": self.padding,
            "dilations": self.dilations,
            "explicit_paddings": [],
        }
        return options

    def dense_forward(self, x, kernel):
        import tensorflow as tf

        return tf.nn.conv2d(x, kernel, **self._dense_options())

    def dense_backward(self, x, dy, kernel):
        import tensorflow as tf

        dx = tf.raw_ops.Conv2DBackpropInput(
            input_sizes=self.input_shape, filter=kernel, out_backprop=dy, **self._dense_options()
        )
        dw = tf.raw_ops.Conv2DBackpropFilter(
            input=x, filter_sizes=self.kernel.shape, out_backprop=dy, **self._dense_options()
        )
        return dx, dw

    def sparse_forward(self, x):
        import keras_sparse as ks

        options = {
            "strides": tuple(self.strides),
            "padding": self.padding.lower(),
            "dilation_rate": tuple(self.dilations),
        }
        if self.routine == "connection":
            return ks.ops.connection_conv2d(x, self.values, *self.table, **options)
        return ks.ops.thinned_conv2d(x, self.values, *self.table, self.packed.kernel_size, **options)

    def sparse_backward(self, x, dy):
        import tensorflow as tf

        from keras_sparse.ops import library

        raw, table, options = library.load(), self.table, self._sparse_options()
        sizes = tf.constant(self.input_shape, "int32")
        kernel_size = list(self.kernel.shape[:2])
        values = tf.convert_to_tensor(self.values)
        if self.routine == "connection":
            dx = raw.keras_sparse_connection_conv2d_backprop_input(sizes, values, *table, dy, **options)
            dw = raw.keras_sparse_connection_conv2d_backprop_filter(x, *table, dy, kernel_size=kernel_size, **options)
        else:
            options = {**options, "kernel_size": kernel_size}
            dx = raw.keras_sparse_thinned_conv2d_backprop_input(sizes, values, *table, dy, **options)
            dw = raw.keras_sparse_thinned_conv2d_backprop_filter(x, *table, dy, **options)
        return dx, dw

    def kept_gradient(self, dense_dw):
        """Return the part of a dense filter gradient that the sparse op returns, in its order."""
        import numpy as np

        if self.routine == "thinned":
            return dense_dw.reshape(-1, dense_dw.shape[-1])[self.packed.indices]
        outputs = np.repeat(np.arange(len(self.packed.row_splits) - 1), np.diff(self.packed.row_splits))
        return dense_dw[:, :, self.packed.input_channels, outputs].transpose(2, 0, 1)

    def functions(self, which):
        """Return `({name: function}, shapes of their inputs)`."""
        if which == "forward":
            dense, sparse, shapes = self.dense_forward, self.sparse_forward, [self.input_shape]
        else:
            dense, sparse, shapes = self.dense_backward, self.sparse_backward, [self.input_shape, self.output_shape]
        return {
            "dense_constant": lambda *tensors: dense(*tensors, self.kernel),
            "dense_argument": lambda *tensors: dense(*tensors, self.variable),
            "sparse": sparse,
        }, shapes

    def largest_error(self, which, generator):
        """Return the largest difference between dense and sparse results, relative to the largest value."""
        import numpy as np
        import tensorflow as tf

        functions, shapes = self.functions(which)
        inputs = [tf.constant(generator.standard_normal(shape).astype("float32")) for shape in shapes]
        dense = [t.numpy() for t in tf.nest.flatten(functions["dense_argument"](*inputs))]
        sparse = [t.numpy() for t in tf.nest.flatten(functions["sparse"](*inputs))]
        if which == "backward":
            dense[1] = self.kept_gradient(dense[1])
        return max(
            float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) if a.size else 0.0 for a, b in zip(dense, sparse)
        )


def measured_peak():
    """Return the best rate of a large matrix product, GF/s."""
    import time

    import tensorflow as tf

    size = 1536
    a, b = tf.random.normal((size, size)), tf.random.normal((size, size))
    best = math.inf
    for _ in range(12):
        start = time.perf_counter()
        tf.matmul(a, b).numpy()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def run_cells(args):
    """Time all cells in this process, whose number of threads is set already; returns the records."""
    import numpy as np
    import tensorflow as tf

    from keras_sparse.engine import timing

    threads = args.threads[0]
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    import keras_sparse as ks

    if not ks.ops.is_available():
        raise SystemExit("The compiled ops are missing: there is nothing to compare.")
    peak = measured_peak()
    print(f"{threads} thread(s), measured peak {peak:.0f} GF/s, {args.which}, {args.routine}", flush=True)
    print(
        f"{'layer':24s} {'density':>7s} {'batch':>5s} {'dense ms':>9s} {'sparse ms':>9s} {'ratio':>6s} "
        f"{'GF/s':>6s} {'peak':>5s}"
    )
    records = []
    for layer, density, batch in itertools.product(read_layers(args.layers), args.density, args.batch):
        generator = np.random.default_rng(args.seed)
        cell = Cell(layer, density, batch, args.routine, generator)
        error = cell.largest_error(args.which, generator)
        # float32 sums of up to in_channels * taps * positions terms, in another order
        if not error < 1e-4:
            raise SystemExit(f"{layer['name']} at density {density}: results differ by {error:.1e}")
        functions, shapes = cell.functions(args.which)
        # Cells are repeated within the graph until a call's own cost, 0.1 ms, vanishes beside the sparse op, the
        # shorter one, whose time is guessed from its sums and from the memory it moves.
        guess = cell.flops / 150e9 + 4 * sum(math.prod(shape) for shape in shapes) / 10e9
        # TensorFlow keeps copies of a constant filter for each of its ops.
        unroll = int(min(256, max(2, min(0.02 / guess, 3e8 // cell.kernel.nbytes))))
        seconds = timing.alternate(functions, shapes, unroll=unroll, repeats=args.repeats, budget=args.budget)
        gc.collect()  # graphs, and the filters they hold, lie in reference cycles
        dense = min(seconds["dense_constant"], seconds["dense_argument"])
        rate = cell.flops * (1 if args.which == "forward" else 2) / seconds["sparse"] / 1e9
        record = {
            "layer": layer["name"],
            "density": density,
            "batch": batch,
            "threads": threads,
            "pass": args.which,
            "routine": args.routine,
            "dense_ms": dense * 1e3,
            "dense_constant_ms": seconds["dense_constant"] * 1e3,
            "dense_argument_ms": seconds["dense_argument"] * 1e3,
            "sparse_ms": seconds["sparse"] * 1e3,
            "ratio": dense / seconds["sparse"],
            "gflops_on_kept_weights": rate,
            "percent_of_peak": 100 * rate / peak,
            "largest_relative_error": error,
        }
        records.append(record)
        print(
            f"{layer['name']:24s} {density:7.3f} {batch:5d} {record['dense_ms']:9.3f} {record['sparse_ms']:9.3f} "
            f"{record['ratio']:6.2f} {rate:6.0f} {record['percent_of_peak']:4.0f}%",
            flush=True,
        )
    return {"threads": threads, "peak_gflops": peak, "records": records}


def print_means(records):
    """Print the geometric mean of the ratios over layers and batch sizes."""
    print(f"\nGeometric means of the ratio\n{'threads':>7s} {'density':>7s} {'cells':>5s} {'mean':>6s} {'worst':>6s}")
    key = lambda r: (r["threads"], -r["density"])  # noqa: E731
    for (threads, density), group in itertools.groupby(sorted(records, key=key), key):
        ratios = [r["ratio"] for r in group]
        mean = common.geometric_mean(ratios)
        print(f"{threads:7d} {-density:7.3f} {len(ratios):5d} {mean:6.2f} {min(ratios):6.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).parent
    parser.add_argument("--layers", default=str(here / "layers" / "survey.csv"), help="CSV file of layers")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.3, 0.1, 0.05, 0.01])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--pass", dest="which", default="forward", choices=("forward", "backward"))
    parser.add_argument("--routine", default="connection", choices=("connection", "thinned"))
    parser.add_argument("--repeats", type=int, default=7, help="rounds at least")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for one function of a cell, roughly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the records")
    args = parser.parse_args()
    if not all(0 < density <= 1 for density in args.density):
        parser.error(f"--density must lie in (0, 1], received {args.density}")
    if min(args.batch) < 1 or min(args.threads) < 1:
        parser.error(f"--batch and --threads must be at least 1, received {args.batch} and {args.threads}")

    if len(args.threads) == 1:
        runs = [run_cells(args)]
    else:  # TensorFlow sets its threads once in a process
        runs = []
        for threads in args.threads:
            with tempfile.TemporaryDirectory() as folder:
                out = os.path.join(folder, "run.json")
                command = [sys.executable, __file__, "--layers", args.layers, "--threads", str(threads), "--json", out]
                command += ["--density", *map(str, args.density), "--batch", *map(str, args.batch)]
                command += ["--pass", args.which, "--routine", args.routine, "--repeats", str(args.repeats)]
                command += ["--budget", str(args.budget), "--seed", str(args.seed)]
                subprocess.run(command, check=True)
                runs += json.loads(pathlib.Path(out).read_text())["runs"]
    records = [record for run in runs for record in run["records"]]
    print_means(records)
    if args.json:
        common.write_result(args.json, {"runs": runs})


if __name__ == "__main__":
    main()
