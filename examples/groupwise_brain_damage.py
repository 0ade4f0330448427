"""Experiments of "Fast ConvNets Using Group-wise Brain Damage" (Lebedev & Lempitsky, 2016), again.

    python examples/groupwise_brain_damage.py mnist --data-dir ~/tensorflow_datasets
    python examples/groupwise_brain_damage.py gradual --data-dir ~/tensorflow_datasets
    python examples/groupwise_brain_damage.py gradual --network resnet20 --weights resnet20.npz
    python examples/groupwise_brain_damage.py speed

mnist: LeNet from scratch, error against density (Figure 3): the group lasso, l1, fixed patterns and no regularizer,
each before and after fine-tuning. gradual: a trained network, sparsified as far as its accuracy on held-out images
allows (Figure 5): LeNet, or a ResNet-20 for CIFAR-10 whose weights are in a file of arrays named as in PyTorch
checkpoints, OIHW. speed: LeNet's second convolution, speed-up against density (Figure 2).

Each leaves a JSON file of every run, with its command, seed and times, a table and pictures. A run that is in the file
is not made again, so that an interrupted experiment goes on where it stopped.
"""

import argparse
import functools
import math
import pathlib
import tempfile
import time

import evidence
import keras
import numpy as np

import keras_sparse as ks
from keras_sparse import files

CLASSES = 10
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)
LAMBDAS = {"none": (0.0,), "l21": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "l1": (4e-4, 1.6e-3)}
PATTERNS = ("center", "two_adjacent", "cross")
LABELS = {"l21": "group lasso", "l1": "l1", "none": "no regularizer"}
BATCH = 64


# Networks.


def lenet():
    """Caffe's LeNet: 20 and 50 maps of 5x5 taps without padding, each followed by a max pool, and 500 units."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(20, 5, name="conv1"),
            keras.layers.MaxPooling2D(name="pool1"),
            keras.layers.Conv2D(50, 5, name="conv2"),
            keras.layers.MaxPooling2D(name="pool2"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(500, activation="relu", name="fc1"),
            keras.layers.Dense(CLASSES, name="fc2"),
        ],
        name="lenet",
    )


def resnet20():
    """ResNet-20 for CIFAR-10 with shortcuts that have no weights (He et al., 2016, section 4.2, option A)."""

    def normalized(x, filters, strides, name):
        # Strided convolutions of the original weights pad both sides by one, which "same" does not.
        if strides != 1:
            x = keras.layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
        padding = "same" if strides == 1 else "valid"
        x = keras.layers.Conv2D(filters, 3, strides, padding, use_bias=False, name=name)(x)
        return keras.layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name=name.replace("conv", "bn"))(x)

    def shortcut(x, filters, name):
        """Every other pixel, with zeros for the new maps, half of them before the old ones and half behind."""
        new = filters - x.shape[-1]
        x = keras.layers.AveragePooling2D(1, strides=2, name=f"{name}_subsample")(x)
        x = keras.layers.Permute((3, 1, 2), name=f"{name}_first")(x)
        x = keras.layers.ZeroPadding2D(((new // 2, new - new // 2), (0, 0)), name=f"{name}_zeros")(x)
        return keras.layers.Permute((2, 3, 1), name=f"{name}_last")(x)

    inputs = keras.Input((32, 32, 3))
    x = keras.layers.ReLU(name="relu")(normalized(inputs, 16, 1, "conv1"))
    for stage, filters in enumerate((16, 32, 64), start=1):
        for block in range(3):
            name = f"layer{stage}_{block}"
            strides = 2 if stage > 1 and block == 0 else 1
            y = keras.layers.ReLU(name=f"{name}_relu1")(normalized(x, filters, strides, f"{name}_conv1"))
            y = normalized(y, filters, 1, f"{name}_conv2")
            x = x if strides == 1 else shortcut(x, filters, f"{name}_shortcut")
            x = keras.layers.ReLU(name=f"{name}_relu2")(keras.layers.Add(name=f"{name}_add")([x, y]))
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, name="linear")(x), name="resnet20")


def load_weights(model, path):
    """Read the arrays of a PyTorch checkpoint (`layer1.0.conv1.weight`, ...) into `resnet20()`."""
    with np.load(path) as arrays:
        for layer in model.layers:
            name = layer.name.replace("_", ".")
            if isinstance(layer, keras.layers.Conv2D):
                layer.set_weights([arrays[f"{name}.weight"].transpose(2, 3, 1, 0)])
            elif isinstance(layer, keras.layers.Dense):
                layer.set_weights([arrays[f"{name}.weight"].T, arrays[f"{name}.bias"]])
            elif isinstance(layer, keras.layers.BatchNormalization):
                parts = ("weight", "bias", "running_mean", "running_var")
                layer.set_weights([arrays[f"{name}.{part}"] for part in parts])


def convolutions(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]


def compile_model(model, learning_rate, steps=None):
    rate = learning_rate if steps is None else keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])


def density_of(layer):
    return float((np.asarray(layer.kernel) != 0).mean())


# (a) LeNet from scratch: error against density.


class Mnist:
    """Images to train on, images to choose lambda by, and the test images."""

    def __init__(self, data_dir, images, seed):
        train_x, train_y, self.test_x, self.test_y = evidence.load_data("mnist", data_dir)
        order = np.random.default_rng(seed).permutation(len(train_x))
        chosen, held_out = order[:images], order[-5000:]
        self.train_x, self.train_y = train_x[chosen], train_y[chosen]
        self.held_out_x, self.held_out_y = train_x[held_out], train_y[held_out]

    def errors(self, model):
        """Return the error on the held-out and on the test images."""
        pairs = ((self.held_out_x, self.held_out_y), (self.test_x, self.test_y))
        wrong = [model.predict(x, batch_size=500, verbose=0).argmax(-1) != y for x, y in pairs]
        return {"held_out_error": float(wrong[0].mean()), "error": float(wrong[1].mean())}


REGULARIZERS = {
    "none": lambda lambda_: None,
    "l21": ks.regularizers.GroupLasso,
    "l1": keras.regularizers.L1,
}


def trained_lenet(data, scratch, *, method, lambda_, seed, images, epochs):
    """Return LeNet with group masks of ones, trained with a regularizer on its convolutions; kept in `scratch`."""
    keras.utils.set_random_seed(seed)
    model = ks.sparsify(lenet(), granularity="group", include="conv.*")
    path = scratch / f"lenet-{method}-{lambda_:g}-{seed}-{images}-{epochs}.weights.h5"
    if path.exists():
        model.load_weights(path)
        return model
    images = data(images, seed)
    compile_model(model, 0.02, epochs * math.ceil(len(images.train_x) / BATCH))
    regularizer = REGULARIZERS[method](lambda_)
    callbacks = [ks.callbacks.Regularization(regularizer, include="conv.*")] if regularizer else []
    model.fit(images.train_x, images.train_y, batch_size=BATCH, epochs=epochs, callbacks=callbacks, verbose=0)
    scratch.mkdir(parents=True, exist_ok=True)
    with files.replacing(path.with_name(f"staged-{path.name}")) as staging:
        model.save_weights(f"{staging}.weights.h5")
        pathlib.Path(f"{staging}.weights.h5").replace(path)
    path.with_name(f"staged-{path.name}").unlink()
    return model


def prune(model, density):
    """Set the groups with the smallest norms to zero, the same share in both convolutions."""
    pruning = ks.callbacks.GradualPruning(ks.schedules.OneShot(1 - density), criterion="l2", include="conv.*")
    pruning.start(model)
    pruning.finish()


def train_with_penalty(data, scratch, densities, **settings):
    """Train LeNet with a regularizer and prune it to each density, without fine-tuning."""
    model = trained_lenet(data, scratch, **settings)
    images = data(settings["images"], settings["seed"])
    weights, before = model.get_weights(), []
    dense = images.errors(model)
    for density in densities:
        model.set_weights(weights)
        prune(model, density)
        measured = {layer.name: density_of(layer) for layer in convolutions(model)}
        before.append({"density": density, "layers": measured, **images.errors(model)})
    return {"dense": dense, "before": before}


def fine_tune(data, scratch, *, density, fine_tuning, **settings):
    """Prune a trained LeNet and train it on with fixed patterns and no regularizer."""
    model = trained_lenet(data, scratch, **settings)
    images = data(settings["images"], settings["seed"])
    prune(model, density)
    compile_model(model, 0.01, fine_tuning * math.ceil(len(images.train_x) / BATCH))
    model.fit(images.train_x, images.train_y, batch_size=BATCH, epochs=fine_tuning, verbose=0)
    return {**images.errors(model), "layers": {layer.name: density_of(layer) for layer in convolutions(model)}}


def train_pattern(data, *, pattern, seed, images, epochs):
    """Train LeNet whose convolutions have a fixed pattern from the start."""
    mask = ks.initializers.PatternMask(pattern)
    model = ks.sparsify(lenet(), granularity="group", include="conv.*", mask_initializer=mask)
    images = data(images, seed)
    compile_model(model, 0.02, epochs * math.ceil(len(images.train_x) / BATCH))
    model.fit(images.train_x, images.train_y, batch_size=BATCH, epochs=epochs, verbose=0)
    layers = {layer.name: density_of(layer) for layer in convolutions(model)}
    return {**images.errors(model), "layers": layers, "density": ks.criteria.FixedPattern(pattern).count(5) / 25}


def mnist(arguments):
    data = functools.cache(functools.partial(Mnist, arguments.data_dir))
    results = evidence.Results(arguments.output / "mnist.json")
    common = {"images": arguments.images, "epochs": arguments.epochs}
    for seed in range(arguments.seed, arguments.seed + arguments.rounds):
        for method in (name for name in LAMBDAS if name in arguments.methods):
            train = functools.partial(train_with_penalty, data, arguments.scratch, arguments.densities)
            for value in LAMBDAS[method]:
                results.run(train, method=method, lambda_=value, seed=seed, **common)
            for density in arguments.densities:
                best = best_lambda(results, method, density, seed=seed, **common)["settings"]["lambda_"]
                tune = functools.partial(fine_tune, data, arguments.scratch)
                settings = {"density": density, "fine_tuning": arguments.fine_tuning, "method": method}
                results.run(tune, **settings, lambda_=best, seed=seed, **common)
        for pattern in PATTERNS if "patterns" in arguments.methods else ():
            # As many epochs as the others have with their fine-tuning.
            epochs = arguments.epochs + arguments.fine_tuning
            results.run(
                functools.partial(train_pattern, data),
                pattern=pattern,
                seed=seed,
                images=arguments.images,
                epochs=epochs,
            )
    report_mnist(evidence.Results(results.path), arguments)


def best_lambda(results, method, density, **settings):
    """Return the training that is best before fine-tuning, by images that are not for testing (section 5.2)."""

    def error(record):
        return next(entry["held_out_error"] for entry in record["before"] if entry["density"] == density)

    return min((r for r in results.find(method=method, **settings) if "before" in r), key=error)


def report_mnist(results, arguments):
    """Draw and tabulate all runs of this length, those of other calls too."""
    common = {"images": arguments.images, "epochs": arguments.epochs}
    curves, rows = {}, []
    for method, label in LABELS.items():
        for tuned in results.find(method=method, fine_tuning=arguments.fine_tuning, **common):
            settings = tuned["settings"]
            density = settings["density"]
            best = best_lambda(results, method, density, seed=settings["seed"], **common)
            before = next(entry["error"] for entry in best["before"] if entry["density"] == density)
            curves.setdefault(f"{label}, pruned", []).append((density, before))
            curves.setdefault(f"{label}, fine-tuned", []).append((density, tuned["error"]))
            rows.append([label, density, settings["lambda_"], before, tuned["error"]])
    for record in results.find(images=arguments.images, epochs=arguments.epochs + arguments.fine_tuning):
        if "pattern" in record["settings"]:
            curves.setdefault("fixed patterns", []).append((record["density"], record["error"]))
            rows.append([f"pattern {record['settings']['pattern']}", record["density"], "", "", record["error"]])
    dense = [record["dense"]["error"] for record in results.find(method="none", **common) if "dense" in record]
    if not curves or not dense:
        return
    draw_tradeoff(curves, float(np.mean(dense)), arguments.output / "mnist.png")
    merged = {}
    for label, density, lambda_, before, after in rows:
        merged.setdefault((label, density), []).append((lambda_, before, after))
    lines = [["dense", "1", "", "", describe(dense)]]
    for (label, density), entries in merged.items():
        lambdas, before, after = zip(*entries)
        used = ", ".join(f"{value:g}" for value in sorted(set(lambdas) - {"", 0.0}))
        lines.append([label, f"{density:g}", used, describe(before), describe(after)])
    header = ["method", "density", "lambda", "test error when pruned", "fine-tuned, or trained so"]
    write_table(arguments.output / "mnist.md", header, lines)


def describe(errors):
    """Return the mean over seeds, with the deviation where there are several."""
    if "" in errors:
        return ""
    mean, spread = evidence.mean_and_spread(errors)
    return f"{mean:.2%}" + (f" ± {spread:.2%}" if len(errors) > 1 else "")


def draw_tradeoff(curves, dense, path):
    """Figure 3: before and after fine-tuning, side by side."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, ending, title in zip(axes, ("pruned", "fine-tuned"), ("before fine-tuning", "after fine-tuning")):
        shown = {label.split(",")[0]: points for label, points in curves.items() if label.endswith(ending)}
        shown |= {label: points for label, points in curves.items() if label == "fixed patterns"}
        ks.plot_tradeoff(shown, baseline=dense, log=True, ax=axis)
        axis.set_title(title, fontsize=10)
        axis.set_yscale("log")
        ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
        axis.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axis.minorticks_off()
    axes[1].set_ylabel("")
    save(figure, path)


# (b) Gradual sparsification of a trained network.


class Augmented(keras.utils.PyDataset):
    """Random batches of CIFAR-10, each image shifted by up to four pixels and perhaps mirrored."""

    def __init__(self, x, y, steps, seed):
        super().__init__()
        self.x, self.y, self.steps, self.seed, self.epoch = x, y, steps, seed, 0

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        generator = np.random.default_rng([self.seed, self.epoch, index])
        chosen = generator.choice(len(self.x), BATCH, replace=False)
        padded = np.pad(self.x[chosen], ((0, 0), (4, 4), (4, 4), (0, 0)))
        shifts = generator.integers(0, 9, (BATCH, 2))
        batch = np.stack([image[a : a + 32, b : b + 32] for image, (a, b) in zip(padded, shifts)])
        mirrored = generator.random(BATCH) < 0.5
        batch[mirrored] = batch[mirrored, :, ::-1]
        return batch, self.y[chosen]

    def on_epoch_end(self):
        self.epoch += 1


def prepared(network, arguments):
    """Return a trained network, what `fit` trains on, and the held-out images.

    Held out are the test images, as in the paper, or the first of them.
    """
    if network == "lenet":
        data = functools.cache(functools.partial(Mnist, arguments.data_dir))
        settings = {"images": arguments.images, "epochs": arguments.pretraining, "seed": arguments.seed}
        model = ks.strip(trained_lenet(data, arguments.scratch, method="none", lambda_=0.0, **settings))
        images = data(arguments.images, arguments.seed)
        rows = np.random.default_rng(arguments.seed)

        def batches():
            while True:
                chosen = rows.integers(0, len(images.train_x), BATCH)
                yield images.train_x[chosen], images.train_y[chosen]

        return model, batches(), (images.test_x, images.test_y)
    train_x, train_y, test_x, test_y = evidence.load_data("cifar10", arguments.data_dir)
    train_x, train_y = train_x[: arguments.images], train_y[: arguments.images]
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    train_x, test_x = (train_x - mean) / deviation, (test_x - mean) / deviation
    model = resnet20()
    load_weights(model, arguments.weights)
    return model, Augmented(train_x, train_y, arguments.steps, arguments.seed), (test_x, test_y)


def sparsify_gradually(arguments, *, network, seed, images, epochs, steps, held_out, learning_rate, **damage):
    dense, batches, (x, y) = prepared(network, arguments)
    compile_model(dense, learning_rate)
    whole = dense.evaluate(x, y, batch_size=250, verbose=0, return_dict=True)["accuracy"]
    print(f"  test error of the trained network on {len(x)} images: {1 - whole:.2%}", flush=True)
    model = ks.sparsify(dense, granularity="group", include=keras.layers.Conv2D)
    compile_model(model, learning_rate)
    callback = ks.callbacks.GroupwiseBrainDamage(
        (x[:held_out], y[:held_out]), path=arguments.scratch / f"{network}-{seed}.json", seed=seed, **damage
    )
    show = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: print_epoch(callback.history[-1]))
    model.fit(batches, steps_per_epoch=steps, epochs=epochs, callbacks=[callback, show], verbose=0)
    after = model.evaluate(x, y, batch_size=250, verbose=0, return_dict=True)["accuracy"]
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    model.save_weights(arguments.scratch / f"{network}-{seed}-sparse.weights.h5")
    arguments.output.mkdir(parents=True, exist_ok=True)
    ks.plot_patterns(model, path=arguments.output / f"{network}_patterns.png")
    return {
        "history": callback.history,
        "stopped": callback.stopped,
        "dense_error": 1 - whole,
        "error": 1 - after,
        "densities": {layer.name: density_of(layer) for layer in convolutions(model)},
    }


def time_layers(*, network, batch):
    """Time each convolution of the dense network, as TensorFlow computes it: what densities are weighted by."""
    times = {}
    for layer in convolutions({"lenet": lenet, "resnet20": resnet20}[network]()):
        shape = (batch, *layer.input.shape[1:])
        times[layer.name] = cpu_microseconds({"layer": layer}, shape, rounds=9)["layer"]
    return {"microseconds": times}


def print_epoch(record):
    print(
        f"  epoch {record['epoch']:3d}: density {1 - record['sparsity']:.3f}, drop {record['drop']:+.4f}, on the other "
        f"half {record['test_drop']:+.4f}, theta {record['theta']:.4f} (percentile {record['percentile']:.0f}), "
        f"{record['died']} died",
        flush=True,
    )


def gradual(arguments):
    results = evidence.Results(arguments.output / "gradual.json")
    if arguments.network == "resnet20" and arguments.weights is None:
        raise SystemExit("--network resnet20 needs --weights FILE, the trained network.")
    names = ("seed", "images", "epochs", "steps", "held_out", "learning_rate")
    names += ("delta", "epsilon", "lambda_", "quantile", "patience")
    settings = {name: getattr(arguments, name) for name in names}
    record = results.run(functools.partial(sparsify_gradually, arguments), network=arguments.network, **settings)
    results.run(time_layers, network=arguments.network, batch=BATCH)
    ks.plot_process(record["history"], path=arguments.output / f"{arguments.network}_process.png")
    rows = []
    results = evidence.Results(results.path)
    for record in (record for record in results.records if "history" in record):
        last, kept = record["history"][-1], record["densities"]
        timed = results.find(network=record["settings"]["network"], batch=BATCH)
        times = timed[0]["microseconds"] if timed else {}
        weighted = sum(kept[name] * times[name] for name in times) / sum(times.values()) if times else math.nan
        rows.append(
            [
                f"{record['settings']['network']}, delta {record['settings']['delta']:g}",
                f"{1 - last['sparsity']:.3f}",
                f"{weighted:.3f}",
                f"{last['drop']:.2%}",
                f"{last['test_drop']:.2%}",
                f"{record['dense_error']:.2%}",
                f"{record['error']:.2%}",
                str(len(record["history"]) - 1),
                f"{record['process_seconds'] / 60:.0f}",
            ]
        )
    header = ["network", "density", "weighted by forward time", "drop, steering half", "drop, reporting half"]
    header += ["error before", "error after", "epochs", "CPU min"]
    write_table(arguments.output / "gradual.md", header, rows)


# (c) Speed of LeNet's second convolution.


def time_densities(*, densities, batch, seed):
    """Time the convolution with random groups at each density, and TensorFlow's dense one, turn by turn."""
    import tensorflow as tf

    generator = np.random.default_rng(seed)
    kernel = generator.standard_normal((5, 5, 20, 50)).astype("float32")

    def thinned(density):
        rows = np.sort(generator.permutation(500)[: round(500 * density)]).astype("int32")
        filter = tf.constant(kernel.reshape(500, 50)[rows])
        return lambda x: ks.ops.thinned_conv2d(x, filter, rows, 5)

    functions = {f"{density:g}": thinned(density) for density in densities}
    functions["tensorflow"] = lambda x: tf.nn.conv2d(x, kernel, 1, "VALID")
    return {"microseconds": cpu_microseconds(functions, (batch, 12, 12, 20), rounds=9)}


def cpu_microseconds(functions, shape, rounds, unroll=8):
    """Return the median CPU time of each function, which take turns on the same images.

    That of the process, on one thread: unlike the time on the clock, it says the same on a machine that is busy.
    """
    import tensorflow as tf

    images = [tf.constant(np.random.default_rng(i).standard_normal(shape).astype("float32")) for i in range(unroll)]

    def repeated(function):
        # The images are arguments, so that nothing is computed in advance, and all results are asked for.
        return tf.function(lambda *images: [function(image) for image in images]).get_concrete_function(*images)

    graphs = {name: repeated(function) for name, function in functions.items()}
    times = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            start = time.process_time()
            graph(*images)
            if turn >= 2:  # the first calls trace and optimise
                times[name].append(time.process_time() - start)
    return {name: float(np.median(values)) / unroll * 1e6 for name, values in times.items()}


def speed(arguments):
    import matplotlib.pyplot as plt

    results = evidence.Results(arguments.output / "speed.json")
    densities = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    records = []
    for seed in range(arguments.seed, arguments.seed + arguments.rounds):
        records.append(results.run(time_densities, densities=densities, batch=arguments.batch, seed=seed))
    times = [record["microseconds"] for record in records]
    rows, bars = [], {"thinned": [], "tensorflow": []}
    for density in densities:
        row = [f"{density:g}", f"{1 / density:.1f}"]
        for label, base in (("thinned", "1"), ("tensorflow", "tensorflow")):
            mean, spread = evidence.mean_and_spread([time[base] / time[f"{density:g}"] for time in times])
            bars[label].append((mean, spread))
            row.append(f"{mean:.2f} ± {spread:.2f}")
        row.append(f"{np.median([time[f'{density:g}'] for time in times]):.0f}")
        rows.append(row)
    header = [
        "density",
        "1 / density",
        "over the op at density 1",
        "over TensorFlow's dense op",
        "microseconds, median",
    ]
    write_table(arguments.output / "speed.md", header, rows)
    figure, axis = plt.subplots(figsize=(5.4, 4.2), layout="constrained")
    axis.plot(
        densities, [1 / density for density in densities], "--", color="#75848e", label="1 / density", linewidth=1
    )
    for label, color, text in (
        ("thinned", "#14466b", "over the same op at density 1"),
        ("tensorflow", "#d1603d", "over TensorFlow's dense convolution"),
    ):
        means, spreads = zip(*bars[label])
        axis.errorbar(densities, means, spreads, color=color, marker="o", markersize=4, capsize=3, label=text)
    axis.set(xscale="log", yscale="log", xlabel="density", ylabel="speed-up")
    for dimension, ticks in ((axis.xaxis, (0.05, 0.1, 0.2, 0.5, 1)), (axis.yaxis, (1, 2, 5, 10, 20))):
        dimension.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        dimension.set_minor_locator(plt.NullLocator())
    axis.set_title(f"LeNet's second convolution, batch {arguments.batch}, {len(times)} rounds", fontsize=10)
    axis.grid(color="#e6ebee", linewidth=0.8)
    axis.legend(fontsize=8, frameon=False)
    save(figure, arguments.output / "speed.png")


# Common.


def save(figure, path):
    import matplotlib.pyplot as plt

    with files.replacing(path) as staging:
        figure.savefig(staging, format=path.suffix[1:], dpi=140)
    plt.close(figure)
    print(f"figure: {path}")


def write_table(path, header, rows):
    table = evidence.markdown_table(header, rows)
    with files.replacing(path) as staging:
        pathlib.Path(staging).write_text(table, encoding="utf-8")
    print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="experiment", required=True)

    def command(name, function, text):
        subparser = commands.add_parser(name, help=text)
        evidence.add_arguments(subparser, "groupwise_results")
        scratch = pathlib.Path(tempfile.gettempdir()) / "groupwise_brain_damage"
        subparser.add_argument("--scratch", type=pathlib.Path, default=scratch, help="folder for trained networks")
        subparser.set_defaults(function=function)
        return subparser

    one = command("mnist", mnist, "LeNet from scratch: error against density (Figure 3)")
    one.add_argument("--rounds", type=int, default=1, help="seeds")
    methods = (*LAMBDAS, "patterns")
    one.add_argument("--methods", nargs="+", choices=methods, default=methods, help="run these; draw what there is")
    one.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    one.add_argument("--images", type=int, default=55000, help="how many of the training images")
    one.add_argument("--epochs", type=int, default=10)
    one.add_argument("--fine-tuning", type=int, default=5, help="epochs of fine-tuning")

    two = command("gradual", gradual, "a trained network, sparsified gradually (Figure 5)")
    two.add_argument("--network", choices=("lenet", "resnet20"), default="lenet")
    two.add_argument("--weights", type=pathlib.Path, help="trained weights of ResNet-20, an .npz file")
    two.add_argument("--images", type=int, default=55000, help="how many of the training images")
    two.add_argument("--pretraining", type=int, default=10, help="epochs in which LeNet is trained first")
    two.add_argument("--epochs", type=int, default=100, help="epochs at most; theta moves after each")
    two.add_argument("--steps", type=int, default=200, help="steps of an epoch")
    two.add_argument("--held-out", type=int, default=10000, help="how many of the test images; half of them steer")
    two.add_argument("--learning-rate", type=float, default=0.01)
    two.add_argument("--delta", type=float, default=0.01)
    two.add_argument("--epsilon", type=float, default=0.05)
    two.add_argument("--lambda", type=float, default=0.02, dest="lambda_")
    two.add_argument("--quantile", type=float, default=0.05)
    two.add_argument("--patience", type=int, default=10)

    three = command("speed", speed, "speed-up of LeNet's second convolution against density (Figure 2)")
    three.add_argument("--rounds", type=int, default=20, help="random patterns for each density")
    three.add_argument("--batch", type=int, default=64)

    arguments = parser.parse_args()
    # CPU times are those of one thread.
    evidence.set_threads(1 if arguments.experiment == "speed" else arguments.threads)
    import matplotlib

    matplotlib.use("Agg")
    arguments.function(arguments)


if __name__ == "__main__":
    main()
