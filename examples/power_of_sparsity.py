"""Figures 2, 3 and 6 of "The Power of Sparsity in Convolutional Neural Networks" (Changpinyo et al., 2017), again.

    python examples/power_of_sparsity.py --figure 2 --data-dir ~/tensorflow_datasets
    python examples/power_of_sparsity.py --figure 3 --data-dir ~/tensorflow_datasets
    python examples/power_of_sparsity.py --figure 6 --data-dir ~/tensorflow_datasets

2: MNIST, accuracy of random connection tables beside that of a depth multiplier, against parameters, multiply-adds and
measured latency. 3: the same on CIFAR-10. 6: incremental training on CIFAR-10, accuracy against steps and wall clock.

Each figure leaves `figureN.json` (every run, with its command, seed and times), `figureN.md` (a table) and
`figureN.png`. A run that is in the file is not made again, so that an interrupted experiment goes on where it stopped.
"""

import argparse
import functools
import pathlib
import tempfile
import time

import evidence
import keras
import numpy as np

import keras_sparse as ks

CLASSES = 10
DENSITIES = {2: (1.0, 0.3, 0.1, 0.03, 0.01), 3: (1.0, 0.3, 0.1, 0.03, 0.01)}
# What a run of each figure takes by default; the paper trains many times as long.
STEPS = {2: 600, 3: 600, 6: 1000}
BATCH = {2: 64, 3: 64, 6: 32}
DATASET = {2: "mnist", 3: "cifar10", 6: "cifar10"}
LATENCY_BATCH = 32


# Networks.


def mnist_network():
    """The MNIST network of the TensorFlow tutorials, its hidden layer as the 7x7 convolution it computes.

    Convolutions of 32, 64 and 512 maps: 1.66 million weights, of which the third holds 97%.
    """
    conv = functools.partial(keras.layers.Conv2D, activation="relu", kernel_initializer="he_normal")
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            conv(32, 5, padding="same", name="conv1"),
            keras.layers.MaxPooling2D(name="pool1"),
            conv(64, 5, padding="same", name="conv2"),
            keras.layers.MaxPooling2D(name="pool2"),
            conv(512, 7, name="conv3"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(CLASSES, name="logits"),
        ],
        name="mnist",
    )


def cifar_network():
    """The CIFAR-10 network of the TensorFlow tutorials for 24x24 crops, with batch for local response normalisation."""
    conv = functools.partial(keras.layers.Conv2D, padding="same", use_bias=False, kernel_initializer="he_normal")
    dense = functools.partial(keras.layers.Dense, activation="relu", kernel_initializer="he_normal")
    return keras.Sequential(
        [
            keras.Input((24, 24, 3)),
            conv(64, 5, name="conv1"),
            keras.layers.BatchNormalization(momentum=0.9, name="norm1"),
            keras.layers.ReLU(name="relu1"),
            keras.layers.MaxPooling2D(3, 2, padding="same", name="pool1"),
            conv(64, 5, name="conv2"),
            keras.layers.BatchNormalization(momentum=0.9, name="norm2"),
            keras.layers.ReLU(name="relu2"),
            keras.layers.MaxPooling2D(3, 2, padding="same", name="pool2"),
            keras.layers.Flatten(name="flatten"),
            dense(384, name="local3"),
            dense(192, name="local4"),
            keras.layers.Dense(CLASSES, name="logits"),
        ],
        name="cifar",
    )


def vgg_like():
    """Four wide 3x3 convolutions on 12x12 and 6x6 pixels: they take most of a step's time, and can be sparse.

    The first convolution, 5x5 with stride 2, stays dense: of three input channels there is nothing to leave out.
    """
    conv = functools.partial(keras.layers.Conv2D, padding="same", use_bias=False, kernel_initializer="he_normal")
    layers = [keras.Input((24, 24, 3)), conv(64, 5, strides=2, name="conv1")]
    for index, width in enumerate((None, 128, 128, 256, 256), start=1):
        if width is not None:
            layers.append(conv(width, 3, name=f"conv{index}"))
        layers.append(keras.layers.BatchNormalization(momentum=0.9, name=f"norm{index}"))
        layers.append(keras.layers.ReLU(name=f"relu{index}"))
        if index == 3:
            layers.append(keras.layers.MaxPooling2D(name="pool3"))
    layers += [keras.layers.GlobalAveragePooling2D(name="pool"), keras.layers.Dense(CLASSES, name="logits")]
    return keras.Sequential(layers, name="vgg_like")


NETWORK = {2: mnist_network, 3: cifar_network, 6: vgg_like}


# Data.


class Data:
    """A data set in memory: normalised, CIFAR-10 in random 24x24 crops and mirrored, the middle of test images."""

    def __init__(self, name, data_dir, size):
        train_x, self.train_y, test_x, self.test_y = evidence.load_data(name, data_dir)
        mean, std = train_x.mean((0, 1, 2)), train_x.std((0, 1, 2))
        self.train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
        self.size = size
        self.margin = train_x.shape[1] - size
        at = self.margin // 2
        self.test_x = test_x[:, at : at + size, at : at + size]

    def batches(self, batch_size, seed):
        """Yield training batches without end: a new order each epoch, one crop and mirroring for a batch."""
        generator = np.random.default_rng(seed)
        while True:
            order = generator.permutation(len(self.train_x))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                chosen = order[start : start + batch_size]
                images = self.train_x[chosen]
                if self.margin:
                    top, left = generator.integers(0, self.margin + 1, 2)
                    images = images[:, top : top + self.size, left : left + self.size]
                    images = images[:, :, ::-1] if generator.random() < 0.5 else images
                yield images, self.train_y[chosen]

    def accuracy(self, model, examples=None):
        """Return the share of the first `examples` test images that the model gets right; of all by default."""
        logits = model.predict(self.test_x[:examples], batch_size=250, verbose=0)
        return float(np.mean(logits.argmax(-1) == self.test_y[:examples]))


# Figures 2 and 3: random tables beside a depth multiplier.


def convolutions(model):
    return [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]


def smaller_network(figure, method, density, seed):
    """Return an untrained network of about `density` times the weights in its convolutions.

    Args:
        figure: 2 or 3.
        method: `"multiplier"`: each convolution has sqrt(density) times its maps, rounded up (section 5.2.1).
            `"sparse"`: all maps, and random connection tables.
        density: Share of the weights.
        seed: Draws weights and tables.
    """
    keras.utils.set_random_seed(seed)
    model = NETWORK[figure]()
    if method == "multiplier":
        return ks.depth_multiplier(model, density, of="connections")
    model = ks.sparsify(model, granularity="connection", include=convolutions(model))
    ks.random_tables(model, density, seed=seed)
    return model


def train_and_count(data, *, figure, method, density, seed, steps, batch_size):
    """Train one network; return its accuracy and its counts."""
    model = smaller_network(figure, method, density, seed)
    rate = keras.optimizers.schedules.PolynomialDecay(1e-3, steps, 0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    batches = data().batches(batch_size, seed)
    for step in range(1, steps + 1):
        value = model.train_on_batch(*next(batches))
        report(step, steps, f"loss {float(value):.3f}")
    counts = ks.count(model)
    of_convolutions = [counts["layers"][name] for name in convolutions(model)]
    return {
        "accuracy": data().accuracy(model),
        "conv_params": sum(entry["nnz"] for entry in of_convolutions),
        "conv_connections": sum(entry["connections"] for entry in of_convolutions),
        "params": counts["total"]["nnz"],
        "madds": counts["total"]["madds"],
    }


def latencies(*, figure, densities, batch_size, seed):
    """Measure the exports of untrained networks, turn by turn: weights do not change what a forward pass takes.

    Each network keeps the shortest of its turns, which others on the machine have disturbed least.
    """
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        exports = {}
        for method, backend in (("multiplier", "dense"), ("sparse", "op")):
            for density in densities:
                if method == "sparse" and density == 1:
                    continue
                name = f"{method} {density:g}"
                print(f"  exporting {name}", flush=True)
                model = smaller_network(figure, method, density, seed)
                ks.export(model, pathlib.Path(folder) / name, backend=backend, batch_size=batch_size, verbose=False)
                exports[name] = ks.load(pathlib.Path(folder) / name)
        images = tf.random.normal((batch_size, *model.input_shape[1:]), seed=seed)
        times = {name: [] for name in exports}
        for turn in range(210):
            for name, export in exports.items():
                start = time.perf_counter()
                keras.ops.convert_to_numpy(export(images))
                if turn >= 10:
                    times[name].append(time.perf_counter() - start)
    return {"milliseconds": {name: min(seconds) * 1e3 for name, seconds in times.items()}}


def size_figure(figure, arguments):
    """Figures 2 and 3."""
    data = functools.cache(lambda: Data(DATASET[figure], arguments.data_dir, NETWORK[figure]().input_shape[1]))
    results = evidence.Results(arguments.output / f"figure{figure}.json")
    densities = arguments.densities or DENSITIES[figure]
    records = []
    for seed in range(arguments.seed, arguments.seed + arguments.rounds):
        for method in ("sparse", "multiplier"):
            for density in densities:
                if method == "sparse" and density == 1:
                    continue  # both are the whole network
                settings = {"figure": figure, "method": method, "density": density, "seed": seed}
                settings |= {"steps": arguments.steps or STEPS[figure], "batch_size": BATCH[figure]}
                records.append(results.run(functools.partial(train_and_count, data), **settings))
    latency = results.run(latencies, figure=figure, densities=densities, batch_size=LATENCY_BATCH, seed=arguments.seed)
    rows = summarise(records, latency["milliseconds"])
    write_size_table(figure, rows, records, arguments)
    draw_sizes(figure, rows, records, arguments.output / f"figure{figure}.png")


def summarise(records, milliseconds):
    """Return one row for each method and density: means over rounds."""
    rows = []
    for key in dict.fromkeys((r["settings"]["method"], r["settings"]["density"]) for r in records):
        own = [r for r in records if (r["settings"]["method"], r["settings"]["density"]) == key]
        accuracy, spread = evidence.mean_and_spread([r["accuracy"] for r in own])
        row = {"method": key[0], "density": key[1], "accuracy": accuracy, "spread": spread, "rounds": len(own)}
        row |= {name: float(np.mean([r[name] for r in own])) for name in ("conv_params", "params", "madds")}
        rows.append(row | {"milliseconds": milliseconds[f"{key[0]} {key[1]:g}"]})
    return rows


def report(step, steps, text):
    """Print progress, ten times a run."""
    if step % max(1, steps // 10) == 0:
        print(f"  step {step} of {steps}: {text}", flush=True)


TITLES = {"multiplier": "depth multiplier (dense)", "sparse": "random tables (sparse)"}
COLORS = {"multiplier": "tab:gray", "sparse": "tab:orange"}


def write_size_table(figure, rows, records, arguments):
    header = ["network", "share of weights", "accuracy", "conv weights", "all parameters", "MAdds", "ms"]
    lines = [
        [
            TITLES[row["method"]],
            f"{row['density']:g}",
            f"{row['accuracy']:.2%} ± {row['spread']:.2%}",
            f"{row['conv_params']:,.0f}",
            f"{row['params']:,.0f}",
            f"{row['madds'] / 1e6:,.2f} M",
            f"{row['milliseconds']:.2f}",
        ]
        for row in rows
    ]
    settings = records[0]["settings"]
    text = (
        f"{DATASET[figure]}, {settings['steps']} steps of {settings['batch_size']} images, mean of "
        f"{rows[0]['rounds']} rounds ± standard deviation; ms: one forward pass of the export on {LATENCY_BATCH} "
        "images.\n\n"
    )
    (arguments.output / f"figure{figure}.md").write_text(text + evidence.markdown_table(header, lines))
    print(text + evidence.markdown_table(header, lines))


def draw_sizes(figure, rows, records, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
    settings = records[0]["settings"]
    quantities = (
        ("conv_params", "weights and biases of convolutions", "size"),
        ("madds", "multiply-adds of one image", "arithmetic"),
        ("milliseconds", f"ms for {LATENCY_BATCH} images, exported", "time, measured"),
    )
    for axis, (quantity, label, title) in zip(axes, quantities):
        for method, text in TITLES.items():
            own = sorted((r for r in rows if r["method"] == method or r["density"] == 1), key=lambda r: r["density"])
            x, y = [row[quantity] for row in own], [100 * row["accuracy"] for row in own]
            spread = [100 * row["spread"] for row in own]
            axis.errorbar(x, y, spread, color=COLORS[method], marker="o", markersize=5, capsize=3, label=text)
            for row, a, b in zip(own, x, y):
                below = method == "multiplier"
                axis.annotate(
                    f"{row['density']:g}",
                    (a, b),
                    xytext=(5, -11) if below else (-5, 7),
                    textcoords="offset points",
                    ha="left" if below else "right",
                    fontsize=7,
                    color=COLORS[method],
                )
        axis.set(xscale="log", xlabel=label, title=title)
        if quantity == "milliseconds":
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("{x:g}")
            axis.tick_params(axis="x", which="minor", labelsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(loc="lower right")
    names = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
    canvas.suptitle(
        f"{names[DATASET[figure]]}: one network made smaller in two ways; at each point the share of the convolutions' "
        f"weights.\n{settings['steps']} steps of {settings['batch_size']} images, mean of {rows[0]['rounds']} rounds, "
        "bars: standard deviation",
        fontsize=11,
    )
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


# Figure 6: incremental training.


@keras.saving.register_keras_serializable("power_of_sparsity")
class ConstantThenLinear(keras.optimizers.schedules.LearningRateSchedule):
    """The same learning rate for three quarters of the steps, so that late connections learn too; then down to zero."""

    def __init__(self, learning_rate, steps):
        self.learning_rate, self.steps = learning_rate, steps

    def __call__(self, step):
        left = 1.0 - keras.ops.cast(step, "float32") / self.steps
        return self.learning_rate * keras.ops.minimum(1.0, 4.0 * left)

    def get_config(self):
        return {"learning_rate": self.learning_rate, "steps": self.steps}


def compile_for_growth(model, steps, learning_rate):
    optimizer = keras.optimizers.SGD(ConstantThenLinear(learning_rate, steps), momentum=0.9)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


class Runner:
    """One training run that is made in turns, with its own clocks and its own curve.

    The first step is not on the clocks: TensorFlow traces the graph in it. A step in which the process was
    suspended counts with its process time alone.
    """

    def __init__(self, data, steps, batch_size, seed, learning_rate, initial_density=None, doubling_steps=None):
        keras.utils.set_random_seed(seed)
        self.model = vgg_like()
        self.growing = None
        if doubling_steps is not None:
            # The first convolution reads three channels: 1% of the multiply-adds, and nothing to be sparse in.
            self.model = ks.sparsify(self.model, granularity="connection", exclude=["conv1", "logits"])
            self.growing = ks.callbacks.IncrementalTraining(initial_density, doubling_steps, seed=seed)
        compile_for_growth(self.model, steps, learning_rate)
        if self.growing is not None:
            self.growing.start(self.model)
        self.data, self.steps = data, steps
        self.batches = data.batches(batch_size, seed)
        self.step, self.suspended, self.wall, self.process = 0, 0, 0.0, 0.0
        self.density = 1.0 if self.growing is None else self.growing.update(0)
        self.curve, self.step_times = [], {}

    def turn(self, steps):
        """Take some steps, as many as are left at most."""
        for _ in range(min(steps, self.steps - self.step)):
            batch = next(self.batches)
            wall, process = time.perf_counter(), time.process_time()
            self.model.train_on_batch(*batch)
            self.step += 1
            density = self.density
            if self.growing is not None:
                self.density = self.growing.update(self.step)  # its cost is part of the run
            wall, process = time.perf_counter() - wall, time.process_time() - process
            if wall > 1.0 + 20 * process:  # even with twenty others on the core a step takes less
                self.suspended, wall = self.suspended + 1, process
            if self.step > 1:
                self.wall, self.process = self.wall + wall, self.process + process
                if density == self.density:
                    self.step_times.setdefault(round(density, 4), []).append((wall, process))

    def evaluate(self, examples=None):
        point = {"step": self.step, "wall_seconds": self.wall, "process_seconds": self.process}
        point |= {"density": self.density, "accuracy": self.data.accuracy(self.model, examples)}
        self.curve.append(point)
        return point

    def outcome(self):
        times = {key: np.median(values, axis=0) for key, values in sorted(self.step_times.items())}
        return {
            "curve": self.curve,
            "final": self.curve[-1],
            "suspended_steps": self.suspended,
            "full_density_step": None if self.growing is None else self.growing.schedule.final_step,
            "step_milliseconds": [
                {"density": key, "wall": wall * 1e3, "process": process * 1e3, "steps": len(self.step_times[key])}
                for key, (wall, process) in times.items()
            ],
        }


def compare_growth(
    data, *, steps, periods, initial_density, batch_size, learning_rate, seed, turn, curve_examples, final_examples
):
    """Train dense and incrementally, a few steps each in turn, so that one machine's load weighs on all alike."""
    options = {"batch_size": batch_size, "seed": seed, "learning_rate": learning_rate}
    runs = {
        "dense": Runner(data(), steps, **options),
        "dense, half of the steps": Runner(data(), steps // 2, **options),
    }
    for period in periods:
        runs[f"T = {period}"] = Runner(data(), steps, **options, initial_density=initial_density, doubling_steps=period)
    every = turn * max(1, round(steps / turn / 8))
    for taken in range(0, steps, turn):
        for run in runs.values():
            if run.step == run.steps:
                continue
            run.turn(turn)
            if run.step == run.steps:
                run.evaluate(final_examples)
            elif run.step % every == 0:
                run.evaluate(curve_examples)
        if taken // every != (taken + turn) // every:
            report = ", ".join(f"{name}: {run.curve[-1]['accuracy']:.1%}" for name, run in runs.items() if run.curve)
            print(f"  step {taken + turn} of {steps}: {report}", flush=True)
    return {"runs": {name: run.outcome() for name, run in runs.items()}}


def growth_figure(arguments):
    """Figure 6."""
    data = functools.cache(lambda: Data(DATASET[6], arguments.data_dir, 24))
    results = evidence.Results(arguments.output / "figure6.json")
    steps = arguments.steps or STEPS[6]
    records = []
    for seed in range(arguments.seed, arguments.seed + arguments.rounds):
        settings = {"steps": steps, "periods": [steps // share for share in (16, 11, 8)], "initial_density": 0.01}
        settings |= {
            "batch_size": BATCH[6],
            "learning_rate": 0.05,
            "seed": seed,
            "turn": 20,
            "curve_examples": 1000,
            "final_examples": 5000,
        }
        records.append(results.run(functools.partial(compare_growth, data), **settings))
    write_growth_table(records, arguments.output / "figure6.md")
    draw_growth(records, arguments.output / "figure6.png")


def seconds_until(run, accuracy):
    """Return when a run's test accuracy first reaches a value, as (wall, process) seconds, or `None`."""
    for point in run["curve"]:
        if point["accuracy"] >= accuracy:
            return point["wall_seconds"], point["process_seconds"]
    return None


def write_growth_table(records, path):
    header = ["training", "accuracy", "process time", "wall clock", "accuracy of dense reached after (process time)"]
    lines = []
    for name in records[0]["runs"]:
        accuracy, spread = evidence.mean_and_spread([r["runs"][name]["final"]["accuracy"] for r in records])
        shares, reached = [], []
        for record in records:
            dense, own = record["runs"]["dense"]["final"], record["runs"][name]
            shares.append([own["final"][key] / dense[key] for key in ("wall_seconds", "process_seconds")])
            seconds = seconds_until(own, dense["accuracy"])
            reached.append("never" if seconds is None else f"{seconds[1] / dense['process_seconds']:.0%}")
        wall, process = np.mean(shares, axis=0)
        lines.append([name, f"{accuracy:.2%} ± {spread:.2%}", f"{process:.0%}", f"{wall:.0%}", ", ".join(reached)])
    settings = records[0]["settings"]
    dense = [record["runs"]["dense"]["final"] for record in records]
    wall, process = (np.mean([run[key] for run in dense]) for key in ("wall_seconds", "process_seconds"))
    text = (
        f"{DATASET[6]}, {settings['steps']} steps of {settings['batch_size']} images, mean of {len(records)} round(s); "
        f"times are shares of the dense run's {process:.0f} s of process time and {wall:.0f} s of wall clock. With one "
        "thread on an idle core both are the same; where others load the machine, compare the process times.\n\n"
    ) + evidence.markdown_table(header, lines)
    text += "\n" + evidence.markdown_table(
        ["density", "ms a step, wall clock", "ms a step, process time", "share of the dense step (process time)"],
        [
            [f"{d:g}", f"{wall:.1f}", f"{process:.1f}", f"{share:.2f}"]
            for d, wall, process, share in step_times(records)
        ],
    )
    path.write_text(text)
    print(text)


def step_times(records):
    """Return `[(density, wall ms, process ms, share of dense)]` of the incremental runs, medians over all of them."""
    dense = np.median([t["process"] for r in records for t in r["runs"]["dense"]["step_milliseconds"]])
    found = {}
    for record in records:
        for name, run in record["runs"].items():
            if not name.startswith("dense"):
                for entry in run["step_milliseconds"]:
                    found.setdefault(round(entry["density"], 3), []).append((entry["wall"], entry["process"]))
    rows = []
    for density, times in sorted(found.items()):
        wall, process = np.median(times, axis=0)
        rows.append((density, wall, process, process / dense))
    return rows


def _shares_of_dense_time(record, name):
    dense = record["runs"]["dense"]["final"]["process_seconds"]
    return [100 * point["process_seconds"] / dense for point in record["runs"][name]["curve"]]


def draw_growth(records, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, (by_step, by_time, cost) = plt.subplots(
        1, 3, figsize=(15, 4.6), width_ratios=(1, 1, 0.7), layout="constrained"
    )
    runs = records[0]["runs"]
    final = 100 * np.mean([record["runs"]["dense"]["final"]["accuracy"] for record in records])
    seconds = np.mean([record["runs"]["dense"]["final"]["process_seconds"] for record in records])
    colors = dict(zip(runs, ("black", "tab:gray", "tab:red", "tab:orange", "tab:blue")))
    for name, run in runs.items():
        label = name if name.startswith("dense") else f"incremental, {name} steps"
        style = {"color": colors[name], "label": label, "linestyle": ":" if "half" in name else "-"}
        steps = [point["step"] for point in run["curve"]]
        accuracy = 100 * np.mean([[p["accuracy"] for p in r["runs"][name]["curve"]] for r in records], axis=0)
        time_shares = np.mean([_shares_of_dense_time(record, name) for record in records], axis=0)
        for axis, x in ((by_step, steps), (by_time, time_shares)):
            axis.plot(x, accuracy, **style)
            axis.plot(x[-1], accuracy[-1], "o", color=colors[name], markersize=6)
            if run["full_density_step"]:
                full = next(i for i, step in enumerate(steps) if step >= run["full_density_step"])
                axis.plot(x[full], accuracy[full], "^", color=colors[name], markersize=9)
    by_time.axvline(50, color="black", linewidth=0.8, linestyle="--")
    for axis, label in ((by_step, "optimizer step"), (by_time, "process time, % of the dense run's")):
        axis.axhline(final, color="black", linewidth=0.8, linestyle="--")
        axis.set(xlabel=label, ylabel="test accuracy, %")
        axis.grid(alpha=0.3)
    by_time.text(
        49, by_time.get_ylim()[0], "half of the dense run's time", rotation=90, va="bottom", ha="right", fontsize=8
    )
    by_step.set_title("Equal steps: connections double every T steps, from 1%")
    by_time.set_title(f"The same runs against the clock (100% = {seconds:.0f} s)")
    by_step.plot([], [], "^", color="gray", markersize=9, linestyle="", label="all connections are there from here")
    by_step.legend(loc="lower right", fontsize=8)
    densities, _, _, shares = zip(*step_times(records))
    bars = cost.bar(range(len(shares)), shares, color="tab:orange")
    cost.bar_label(bars, fmt="%.2f", fontsize=8)
    cost.axhline(1, color="black", linewidth=0.8, linestyle="--")
    cost.set_xticks(range(len(shares)), [f"{density:.0%}" for density in densities], fontsize=8)
    cost.set(
        xlabel="connections there are",
        ylabel="time of a step / of a dense step",
        title="What a step costs (process time)",
    )
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=int, required=True, choices=sorted(NETWORK), help="figure of the paper")
    parser.add_argument("--rounds", type=int, default=2, help="runs with different seeds to average over")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a run; default {STEPS} by figure")
    parser.add_argument("--densities", type=float, nargs="+", help=f"of figures 2 and 3; default {DENSITIES}")
    evidence.add_arguments(parser, output="power_of_sparsity_results")
    arguments = parser.parse_args()
    evidence.set_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.figure == 6:
        growth_figure(arguments)
    else:
        size_figure(arguments.figure, arguments)


if __name__ == "__main__":
    main()
