"""Large-sparse against small-dense: the experiments of Zhu & Gupta, "To prune, or not to prune" (2017), made small.

    python examples/to_prune_or_not.py ptb --data-dir ~/ptb                    # hours on a CPU
    python examples/to_prune_or_not.py mobilenet --data-dir ~/tensorflow_datasets
    python examples/to_prune_or_not.py report                                  # tables and figures of what was run

ptb: the small LSTM language model of section 4.2 on the Penn Tree Bank, dense and pruned to 80 and 90%, with the
hyper-parameters of Zaremba et al. (2014). --data-dir holds ptb.train.txt, ptb.valid.txt and ptb.test.txt.
mobilenet: a MobileNet for small images at four widths, and the widest pruned until its file is as small as those of
the narrower ones (section 4.1, Table 6).

Runs that are in the results file are not made again.
"""

import argparse
import os
import pathlib
import re
import tempfile

import evidence  # first: it quiets TensorFlow
import keras
import numpy as np

import keras_sparse as ks
from keras_sparse import files

OUTPUT = pathlib.Path(__file__).parents[1] / "docs" / "results"
NAME = "to_prune_or_not"

# The language model.

VOCABULARY, UNITS, BATCH, STEPS = 10_000, 200, 20, 20


def read_ptb(folder):
    """Return `{split: array of word numbers}` and the vocabulary's size."""
    texts = {}
    for split in ("train", "valid", "test"):
        with open(os.path.join(folder, f"ptb.{split}.txt"), encoding="utf-8") as file:
            texts[split] = file.read().replace("\n", " <eos> ").split()
    # The most frequent word first; ties by the word itself.
    words, counts = np.unique(texts["train"], return_counts=True)
    numbers = {word: number for number, word in enumerate(words[np.lexsort((words, -counts))])}
    return {split: np.array([numbers[word] for word in text], "int32") for split, text in texts.items()}, len(numbers)


def streams(words):
    """Return inputs and targets: batches of `BATCH` streams that go on from batch to batch, `STEPS` words each."""
    length = (len(words) - 1) // (BATCH * STEPS) * STEPS

    def cut(begin):
        rows = words[begin : begin + BATCH * length].reshape(BATCH, length // STEPS, STEPS)
        return rows.transpose(1, 0, 2).reshape(-1, STEPS)

    return cut(0), cut(1)


def language_model(vocabulary):
    """The small model: embedding, two LSTM layers of 200 units, softmax; weights drawn from [-0.1, 0.1]."""
    draw = keras.initializers.RandomUniform(-0.1, 0.1)
    parts = [keras.Input(batch_shape=(BATCH, STEPS), dtype="int32")]
    parts.append(keras.layers.Embedding(vocabulary, UNITS, embeddings_initializer=draw, name="embedding"))
    for number in (1, 2):
        layer = keras.layers.LSTM(
            UNITS,
            return_sequences=True,
            stateful=True,
            kernel_initializer=draw,
            recurrent_initializer=draw,
            unit_forget_bias=False,
            name=f"lstm{number}",
        )
        parts.append(layer)
    parts.append(keras.layers.Dense(vocabulary, kernel_initializer=draw, name="softmax"))
    return keras.Sequential(parts, name="ptb_small")


def summed_over_steps(targets, logits):
    """Cross-entropy summed over a stream's words: what a learning rate of 1 and gradients of norm 5 are meant for."""
    return STEPS * keras.ops.mean(keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True))


def perplexity(loss):
    """Of `summed_over_steps`, a number or a list of them."""
    return np.exp(np.asarray(loss) / STEPS)


class ResetStates(keras.callbacks.Callback):
    """The streams begin anew with each epoch and each evaluation."""

    def _reset(self, *arguments):
        for layer in self.model.layers:
            if isinstance(layer, keras.layers.LSTM):
                layer.reset_states()

    on_epoch_begin = on_test_begin = on_test_end = _reset


def run_ptb(data, vocabulary, sparsity, epochs, hold, tokens, seed):
    """Train one language model; returns its perplexities, sizes and course."""
    train_x, train_y = streams(data["train"][:tokens])
    per_epoch = len(train_x) // BATCH
    model = language_model(vocabulary)
    # The loss tells the perplexity: a metric would take the softmax of 10,000 words a second time.
    model.compile(keras.optimizers.SGD(1.0, global_clipnorm=5.0), loss=summed_over_steps)
    rates = [0.5 ** max(0, epoch + 1 - hold) for epoch in range(epochs)]
    callbacks = [ResetStates(), keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])]
    if sparsity:
        # From the first third of an epoch on, and over before the learning rate is too small to recover.
        schedule = ks.schedules.PolynomialDecay(
            0.0,
            sparsity,
            begin_step=per_epoch // 3,
            end_step=per_epoch * epochs * 2 // 3,
            frequency=min(100, per_epoch // 8),
        )
        callbacks.insert(0, ks.callbacks.GradualPruning(schedule))
    valid = streams(data["valid"])
    history = model.fit(
        train_x,
        train_y,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        validation_data=valid,
        validation_batch_size=BATCH,
        callbacks=callbacks,
        verbose=2,
    ).history
    test = model.evaluate(
        *streams(data["test"]), batch_size=BATCH, verbose=0, callbacks=[ResetStates()], return_dict=True
    )
    return {
        "valid_perplexity": float(perplexity(history["val_loss"][-1])),
        "test_perplexity": float(perplexity(test["loss"])),
        "steps_per_epoch": per_epoch,
        "course": {
            "valid_perplexity": perplexity(history["val_loss"]).tolist(),
            "learning_rate": rates,
            "sparsity": history.get("sparsity", [0.0] * epochs),
        },
        **sizes(model),
    }


# The images.

WIDTHS = (1.0, 0.75, 0.5, 0.375, 0.25)
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1))  # output channels at width 1, stride


def mobilenet(width, classes, shape):
    """A MobileNet for small images: a convolution, five depthwise separable blocks, pooling, a classifier."""

    def normalised(x):
        # Short trainings: averages over 100 steps would still hold the values they began with.
        return keras.layers.ReLU(6.0)(keras.layers.BatchNormalization(momentum=0.9)(x))

    inputs = keras.Input(shape)
    x = keras.layers.Conv2D(int(32 * width), 3, strides=2, padding="same", use_bias=False, name="stem")(inputs)
    x = normalised(x)
    for number, (channels, stride) in enumerate(BLOCKS, start=1):
        name = f"block{number}"
        x = keras.layers.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=False, name=f"{name}_depthwise")(x)
        x = normalised(x)
        x = keras.layers.Conv2D(int(channels * width), 1, use_bias=False, name=f"{name}_pointwise")(x)
        x = normalised(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes, name="logits")(x), name=f"mobilenet_{width}")


# As the paper: the first and the depthwise convolutions stay dense.
PRUNED = ["block._pointwise", "logits"]


def sizes(model):
    """Return what a model holds and takes: in memory, and in the file of `ks.save_compressed`."""
    total = ks.count(model)["total"]
    with tempfile.TemporaryDirectory() as folder:
        written = ks.save_compressed(model, os.path.join(folder, "model"))["bytes"]
    return {"params": total["params"], "nnz": total["nnz"], "bytes": {**total["bytes"], "file": written}}


def predicted_bytes(model, sparsity):
    """Return the bytes of the model's tensors with the layers of `PRUNED` at a sparsity, zeros at random."""
    generator = np.random.default_rng(0)
    pruned = [layer.kernel for layer in model.layers if any(re.fullmatch(pattern, layer.name) for pattern in PRUNED)]
    total = 0
    for weight in model.weights:
        dense = not any(weight is kernel for kernel in pruned)
        kept = np.ones(weight.shape, bool) if dense else generator.random(weight.shape) >= sparsity
        total += ks.storage.nbytes(np.where(kept, 0.5, 0.0).astype("float32"))
    return total


def sparsity_for(model, goal):
    """Return the lowest sparsity, in thousandths, at which the model's tensors take at most `goal` bytes.

    `None` where no sparsity up to 99% is enough: what is not pruned takes too much by itself.
    """
    low, high = 0, 991
    while low < high:
        middle = (low + high) // 2
        fits = predicted_bytes(model, middle / 1000) <= goal
        low, high = (low, middle) if fits else (middle + 1, high)
    return low / 1000 if low < 991 else None


def run_mobilenet(data, width, sparsity, epochs, examples, seed):
    """Train one network; returns its accuracy, sizes and course. An epoch is looked at four times."""
    train_x, train_y, test_x, test_y = data
    held_out = slice(len(train_x) - 2000, None)
    valid = (train_x[held_out], train_y[held_out])
    train_x, train_y = train_x[: len(train_x) - 2000][:examples], train_y[: len(train_y) - 2000][:examples]
    batch, looks = 128, 4
    steps = len(train_x) // batch // looks
    total = steps * looks * epochs
    model = mobilenet(width, int(train_y.max()) + 1, train_x.shape[1:])
    rate = keras.optimizers.schedules.ExponentialDecay(3e-3, total, 0.02)
    model.compile(
        keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    callbacks, updates = [], [{"step": 0, "sparsity": 0.0}]
    if sparsity:
        schedule = ks.schedules.PolynomialDecay(
            0.0, sparsity, begin_step=total // 8, end_step=total * 5 // 8, frequency=max(1, total // 60)
        )
        pruning = ks.callbacks.GradualPruning(schedule, include=PRUNED)
        callbacks, updates = [pruning], pruning.history
    history = model.fit(
        Flipped(train_x, train_y, batch, steps, seed),
        epochs=epochs * looks,
        validation_data=valid,
        validation_batch_size=500,
        callbacks=callbacks,
        verbose=0,
    ).history
    accuracy = model.evaluate(test_x, test_y, batch_size=500, verbose=0, return_dict=True)["accuracy"]
    seen = [steps * (look + 1) for look in range(epochs * looks)]
    return {
        "test_accuracy": accuracy,
        "course": {
            "step": seen,
            "valid_accuracy": history["val_accuracy"],
            "learning_rate": [float(rate(step)) for step in seen],
            "updates": [{"step": record["step"], "sparsity": record["sparsity"]} for record in updates],
        },
        **sizes(model),
    }


class Flipped(keras.utils.PyDataset):
    """Batches in an order of their own each time, half of the images mirrored."""

    def __init__(self, x, y, batch, steps, seed):
        super().__init__()
        self.x, self.y, self.batch, self.steps = x, y, batch, steps
        self.generator = np.random.default_rng(seed)
        self.order = np.array([], "int64")

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        if len(self.order) < self.batch:
            self.order = self.generator.permutation(len(self.x))
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        images = self.x[chosen]
        mirrored = self.generator.random(self.batch) < 0.5
        images[mirrored] = images[mirrored, :, ::-1]
        return images, self.y[chosen]


# The report.


def figures(results, output):
    """Write the tables and the figures of the runs there are."""
    text = ["# To prune, or not to prune: repeated small", "", __doc__.split("\n\n")[0], ""]
    ptb = results.find(experiment="ptb")
    if ptb:
        text += ["## Penn Tree Bank, small model", "", ptb_table(ptb), ptb_notes(ptb), ""]
        draw_ptb(ptb, output / f"{NAME}_ptb.png")
        text += [f"![perplexity, sparsity and learning rate]({NAME}_ptb.png)", ""]
    images = results.find(experiment="mobilenet")
    if images:
        text += ["## MobileNet for small images", "", mobilenet_table(images), mobilenet_notes(images), ""]
        draw_mobilenet(images, output / f"{NAME}_mobilenet.png")
        draw_course(images, output / f"{NAME}_course.png")
        text += [
            f"![accuracy against bytes]({NAME}_mobilenet.png)",
            "",
            f"![sparsity, learning rate and accuracy while training]({NAME}_course.png)",
            "",
        ]
    text += ["## Commands", "", commands(results.records)]
    with files.replacing(output / f"{NAME}.md") as staging:
        pathlib.Path(staging).write_text("\n".join(text))


def commands(records):
    """Return the commands of the runs, with how long they took."""
    seconds = {}
    for record in records:
        line = "python examples/" + " ".join(record["command"])
        seconds[line] = seconds.get(line, 0) + record["wall_seconds"]
    lines = [f"- `{line}`: {total / 60:.1f} minutes of wall time" for line, total in seconds.items()]
    return "\n".join(
        [*lines, "", "Settings, seeds, wall and process times of each run, and the machine, are in the JSON file.", ""]
    )


def ptb_table(records):
    dense = next((r for r in records if not r["settings"]["sparsity"]), records[0])
    header = ["model", "sparsity", "nnz", "dense bytes", "file bytes", "valid perplexity", "test perplexity", "minutes"]
    rows = []
    for record in sorted(records, key=lambda r: r["settings"]["sparsity"]):
        s = record["settings"]["sparsity"]
        rows.append(
            [
                f"small, {'pruned' if s else 'dense'}",
                f"{s:.0%}",
                f"{record['nnz']:,}",
                f"{record['bytes']['dense']:,}",
                f"{record['bytes']['file']:,} ({dense['bytes']['file'] / record['bytes']['file']:.1f}x smaller)",
                f"{record['valid_perplexity']:.1f}",
                f"{record['test_perplexity']:.1f}",
                f"{record['process_seconds'] / 60:.1f}",
            ]
        )
    return evidence.markdown_table(header, rows)


def ptb_notes(records):
    settings = records[0]["settings"]
    rates = ", ".join(f"{rate:g}" for rate in records[0]["course"]["learning_rate"])
    words = "all" if settings["tokens"] is None else f"{settings['tokens']:,}"
    return f"""{settings["epochs"]} epochs (the paper: 13) on {words} words of the training text, learning rates
{rates}, seed {settings["seed"]}; the rest as Zaremba et al. (2014): SGD, norm of the gradient at most 5, 20 streams
of 20 words, weights drawn from [-0.1, 0.1], no dropout. Embedding, kernels and recurrent kernels of both LSTM layers
and the softmax are pruned alike, from a third of the first epoch on until two thirds of the training. Perplexities
are of 20 streams side by side. Minutes are process time, that of all threads together. The paper's dense small model,
fully trained, reaches 115.30 (Table 3).
"""


def mobilenet_table(records):
    header = ["model", "sparsity", "nnz", "tensor bytes", "file bytes", "test accuracy", "minutes"]
    rows = []
    for record in sorted(records, key=lambda r: -r["bytes"]["compressed"]):
        width, sparsity = record["settings"]["width"], record["settings"]["sparsity"]
        rows.append(
            [
                f"width {width}, {'sparse' if sparsity else 'dense'}, seed {record['settings']['seed']}",
                f"{sparsity:.1%}",
                f"{record['nnz']:,}",
                f"{record['bytes']['compressed']:,}",
                f"{record['bytes']['file']:,}",
                f"{record['test_accuracy']:.2%}",
                f"{record['process_seconds'] / 60:.1f}",
            ]
        )
    return evidence.markdown_table(header, rows)


def mobilenet_notes(records):
    settings = records[0]["settings"]
    images = "all" if settings["examples"] is None else f"{settings['examples']:,}"
    return f"""{settings["dataset"]}, {images} training images, {settings["epochs"]} epochs for every model, one
learning rate for all. Sparsities are those of the pointwise convolutions and the classifier. They are chosen before
training so that the tensors take as many bytes as those of a narrower dense network, predicted by
`ks.storage.nbytes`; the narrowest has no sparse rival, since what stays dense takes as much by itself. Tensor bytes are
those of each tensor in its smallest encoding; the file holds the configuration, too. Minutes are process time.
"""


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


COLORS = ("#14466b", "#d1603d", "#3c8d5a", "#b58a17")


def draw_ptb(records, path):
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for color, record in zip(COLORS, sorted(records, key=lambda r: r["settings"]["sparsity"])):
        course, sparsity = record["course"], record["settings"]["sparsity"]
        epochs = np.arange(1, len(course["valid_perplexity"]) + 1)
        left.plot(
            epochs,
            course["valid_perplexity"],
            "o-",
            color=color,
            label=f"{sparsity:.0%} sparse" if sparsity else "dense",
        )
        if sparsity:
            right.plot(epochs, course["sparsity"], "o-", color=color, label=f"sparsity, {sparsity:.0%}")
    right.plot(epochs, course["learning_rate"], "s--", color="#75848e", label="learning rate")
    left.set(xlabel="epoch", ylabel="perplexity, validation", title="Penn Tree Bank, small model", xticks=epochs)
    right.set(xlabel="epoch", title="Sparsity and learning rate", xticks=epochs, ylim=(0, 1.03))
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_mobilenet(records, path):
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 3.9), layout="constrained")
    for color, sparse, label in ((COLORS[0], False, "small-dense"), (COLORS[1], True, "large-sparse")):
        chosen = [r for r in records if bool(r["settings"]["sparsity"]) == sparse]
        if sparse:  # the line begins at the dense network that is pruned
            chosen += [r for r in records if r["settings"]["width"] == 1.0 and not r["settings"]["sparsity"]]
        groups = {}
        for record in chosen:
            groups.setdefault((record["settings"]["width"], record["settings"]["sparsity"]), []).append(record)
        points = sorted(
            (np.mean([r["bytes"]["compressed"] for r in group]), np.mean([r["test_accuracy"] for r in group]), key)
            for key, group in groups.items()
        )
        axis.plot([p[0] / 1e3 for p in points], [p[1] for p in points], "o-", color=color, label=label)
        for size, accuracy, (width, sparsity) in points:
            if bool(sparsity) == sparse:
                text = f"{sparsity:.0%}" if sparse else f"width {width:g}"
                place = (-24, 7) if sparse else (4, -12)
                axis.annotate(text, (size / 1e3, accuracy), place, textcoords="offset points", fontsize=8, color=color)
    axis.set(xlabel="kilobytes of all tensors, smallest encodings", ylabel="test accuracy", xscale="log")
    ticks = [20, 50, 100, 200, 500]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:.1%}")
    axis.margins(x=0.12, y=0.12)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_course(records, path):
    """Sparsity, learning rate and accuracy over the training, as in the paper's Figure 2."""
    plt = pyplot()
    first = min(r["settings"]["seed"] for r in records)
    widest = [r for r in records if r["settings"]["width"] == 1.0 and r["settings"]["seed"] == first]
    widest.sort(key=lambda r: r["settings"]["sparsity"])
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.4, 5.4), sharex=True, layout="constrained")
    for color, record in zip(COLORS, widest):
        course, sparsity = record["course"], record["settings"]["sparsity"]
        label = f"{sparsity:.0%} sparse" if sparsity else "dense"
        last = course["step"][-1]
        updates = [{"step": 0, "sparsity": 0.0}, *course["updates"]]
        steps = [u["step"] for u in updates] + [last]
        above.step(steps, [u["sparsity"] for u in updates] + [updates[-1]["sparsity"]], where="post", color=color)
        below.plot(course["step"], course["valid_accuracy"], "o-", markersize=3, color=color, label=label)
    rate = above.twinx()
    rate.plot(widest[0]["course"]["step"], widest[0]["course"]["learning_rate"], "--", color="#75848e")
    rate.set(ylabel="learning rate (dashed)", yscale="log")
    rate.spines["right"].set_visible(True)
    above.set(ylabel="sparsity", ylim=(-0.02, 1.0), title="Sparsity and learning rate, and the accuracy below")
    below.set(xlabel="optimizer step", ylabel="accuracy, 2,000 images held out")
    below.yaxis.set_major_formatter("{x:.1%}")
    below.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ptb", "mobilenet", "report"))
    evidence.add_arguments(parser, OUTPUT)
    parser.add_argument("--rounds", type=int, default=1, help="seeds to run")
    parser.add_argument("--epochs", type=int, help="13 for ptb, as the paper, 12 for mobilenet")
    parser.add_argument("--hold", type=int, default=4, help="ptb: epochs before the learning rate is halved with each")
    parser.add_argument("--tokens", type=int, help="ptb: words of the training text; all by default")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.8, 0.9], help="ptb: of the models")
    parser.add_argument("--dataset", choices=evidence.DATASETS, default="cifar10", help="mobilenet: the images")
    parser.add_argument("--examples", type=int, help="mobilenet: training images; all by default")
    args = parser.parse_args()
    evidence.set_threads(args.threads)
    results = evidence.Results(args.output / f"{NAME}.json")
    if args.what == "ptb":
        if args.data_dir is None:
            parser.error("ptb needs --data-dir with ptb.train.txt, ptb.valid.txt and ptb.test.txt")
        data, vocabulary = read_ptb(args.data_dir)
        for seed in range(args.seed, args.seed + args.rounds):
            for sparsity in args.sparsities:
                results.run(
                    lambda experiment, **settings: run_ptb(data, vocabulary, **settings),
                    experiment="ptb",
                    sparsity=sparsity,
                    epochs=args.epochs or 13,
                    hold=args.hold,
                    tokens=args.tokens,
                    seed=seed,
                )
    if args.what == "mobilenet":
        data = evidence.load_data(args.dataset, args.data_dir)
        classes, shape = int(data[1].max()) + 1, data[0].shape[1:]
        models = {width: mobilenet(width, classes, shape) for width in WIDTHS}
        goals = [predicted_bytes(models[width], 0.0) for width in WIDTHS[1:]]
        sparsities = [sparsity_for(models[1.0], goal) for goal in goals]
        plans = [(width, 0.0) for width in WIDTHS] + [(1.0, sparsity) for sparsity in sparsities if sparsity]
        for seed in range(args.seed, args.seed + args.rounds):
            for width, sparsity in plans:
                results.run(
                    lambda experiment, dataset, **settings: run_mobilenet(data, **settings),
                    experiment="mobilenet",
                    dataset=args.dataset,
                    width=width,
                    sparsity=sparsity,
                    epochs=args.epochs or 12,
                    examples=args.examples,
                    seed=seed,
                )
    figures(results, args.output)


if __name__ == "__main__":
    main()
