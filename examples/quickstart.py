"""Quickstart: train a small VGG-like network, prune 90% of its connections, export it, and see what it gains.

    python examples/quickstart.py                                  # scikit-learn's digits, no download
    python examples/quickstart.py --dataset cifar10 --data-dir ~/tensorflow_datasets

The three moves that any Keras model needs are marked (1), (2) and (3).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
from evidence import load_data  # noqa: E402

import keras_sparse as ks  # noqa: E402
from keras_sparse.engine.timing import alternate  # noqa: E402

BACKENDS = ("dense", "compact", "op")
LATENCY_BATCH_SIZES = (1, 32)
# dataset -> epochs before and while pruning; an epoch of digits takes seconds, one of CIFAR-10 minutes
EPOCHS = {"digits": (12, 24), "mnist": (1, 2), "fashion_mnist": (1, 2), "cifar10": (2, 4)}


def vgg_like(input_shape, classes):
    """Four 3x3 convolutions of 64 to 256 channels: nearly all of the time goes into convolution."""
    inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(64, 3, padding="same", activation="relu", name="conv1")(inputs)
    if input_shape[0] >= 16:
        x = keras.layers.MaxPooling2D(name="pool1")(x)
    x = keras.layers.Conv2D(128, 3, padding="same", activation="relu", name="conv2")(x)
    x = keras.layers.MaxPooling2D(name="pool2")(x)
    x = keras.layers.Conv2D(256, 3, padding="same", activation="relu", name="conv3")(x)
    x = keras.layers.Conv2D(256, 3, padding="same", activation="relu", name="conv4")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool4")(x)
    outputs = keras.layers.Dense(classes, name="logits")(x)
    return keras.Model(inputs, outputs, name="vgg_like")


def compile_for_training(model, learning_rate):
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def run_in_fresh_process(path, inputs, outputs, library=None):
    """Run a SavedModel in a new process that has TensorFlow and no Keras model; returns its outputs."""
    script = pathlib.Path(__file__).with_name("run_saved_model.py")
    command = [sys.executable, str(script), str(path), str(inputs), str(outputs)]
    subprocess.run(command + (["--op-library", library] if library else []), check=True)
    return np.load(outputs)


def folder_bytes(path):
    return sum(file.stat().st_size for file in pathlib.Path(path).rglob("*") if file.is_file())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", choices=sorted(EPOCHS))
    parser.add_argument("--data-dir", help="where TFDS keeps its data sets (not for digits)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of connections to prune")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("BEFORE", "PRUNING"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="quickstart_results", help="folder for exports, figure and results")
    args = parser.parse_args()
    started = time.time()
    keras.utils.set_random_seed(args.seed)
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    train_x, train_y, test_x, test_y = load_data(args.dataset, args.data_dir)
    epochs_before, epochs_pruning = args.epochs or EPOCHS[args.dataset]
    fit = {"batch_size": args.batch_size, "validation_data": (test_x, test_y), "verbose": 2}

    print(f"Training a dense network on {args.dataset}: {len(train_x)} examples, {train_x.shape[1:]}")
    dense = vgg_like(train_x.shape[1:], int(train_y.max()) + 1)
    compile_for_training(dense, 5e-4)
    before = dense.fit(train_x, train_y, epochs=epochs_before, **fit).history

    print(f"\nPruning {args.sparsity:.0%} of its connections")
    # (1) Sparse layers in place of the dense ones, weights kept. The first convolution and the classifier hold 1% of
    #     the weights and stay whole.
    model = ks.sparsify(dense, granularity="connection", exclude=["conv1", "logits"])
    compile_for_training(model, 5e-4)
    # (2) A callback: the sparsity rises along a cubic in the first two thirds of the steps, the rest is fine-tuning.
    steps = epochs_pruning * -(-len(train_x) // args.batch_size)
    schedule = ks.schedules.PolynomialDecay(
        0.0, args.sparsity, begin_step=0, end_step=steps * 2 // 3, frequency=max(1, steps // 50)
    )
    pruning = ks.callbacks.GradualPruning(schedule, criterion="l2")
    during = model.fit(train_x, train_y, epochs=epochs_pruning, callbacks=[pruning], **fit).history
    ks.summary(model)

    print("\nExporting")
    # (3) A SavedModel for each backend; "op" measures on this machine which layers win by running sparse.
    plans = {name: ks.export(model, output / name, backend=name) for name in BACKENDS}

    np.save(output / "test_x.npy", test_x)
    expected = model.predict(test_x, verbose=0)
    scale = float(np.abs(expected).max())
    rows = [
        {
            "model": "before pruning",
            "accuracy": float(before["val_accuracy"][-1]),
            **{key: ks.count(dense)["total"][key] for key in ("params", "nnz", "madds")},
        }
    ]
    counts = ks.count(model)["total"]
    for name in BACKENDS:
        library = ks.ops.library_path() if name == "op" else None
        got = run_in_fresh_process(output / name, output / "test_x.npy", output / f"{name}.npy", library)
        error = float(np.abs(got - expected).max()) / scale
        if error > 1e-4:
            raise SystemExit(f"The '{name}' export differs from the model by {error:.1e} of its largest output.")
        rows.append(
            {
                "model": f"exported '{name}'",
                "accuracy": float((got.argmax(-1) == test_y.ravel()).mean()),
                **{key: counts[key] for key in ("params", "nnz", "madds")},
                "file_bytes": folder_bytes(output / name),
                "error": error,
            }
        )

    exports = {name: ks.load(output / name) for name in BACKENDS}
    for batch in LATENCY_BATCH_SIZES:
        seconds = alternate(exports, [(batch, *train_x.shape[1:])], repeats=30)
        for row, name in zip(rows[1:], BACKENDS):
            row[f"latency_ms_batch_{batch}"] = seconds[name] * 1e3
            row[f"speed_up_batch_{batch}"] = seconds["dense"] / seconds[name]

    print_table(rows)
    results = {"arguments": vars(args), "rows": rows, "plan": plans["op"], "pruning": pruning.history}
    (output / "results.json").write_text(json.dumps(results, indent=1))
    draw(before, during, rows, epochs_before, output / "quickstart.png")
    print(
        f"\nFigure: {output / 'quickstart.png'}   results: {output / 'results.json'}   ({time.time() - started:.0f} s)"
    )


def print_table(rows):
    header = ["model", "accuracy", "params", "nnz", "MAdds", "file bytes"]
    header += [f"ms, batch {batch}" for batch in LATENCY_BATCH_SIZES]
    table = [header]
    for row in rows:
        cells = [row["model"], f"{row['accuracy']:.2%}", f"{row['params']:,}", f"{row['nnz']:,}", f"{row['madds']:,}"]
        cells.append(f"{row['file_bytes']:,}" if "file_bytes" in row else "")
        for batch in LATENCY_BATCH_SIZES:
            latency, ratio = row.get(f"latency_ms_batch_{batch}"), row.get(f"speed_up_batch_{batch}")
            cells.append("" if latency is None else f"{latency:.3f} ({ratio:.1f}x)")
        table.append(cells)
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    print()
    for row in table:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def draw(before, during, rows, epochs_before, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (training, size, latency) = plt.subplots(
        1, 3, figsize=(13, 3.8), width_ratios=(2, 1, 1.4), layout="constrained"
    )
    accuracy = before["val_accuracy"] + during["val_accuracy"]
    epochs = np.arange(1, len(accuracy) + 1)
    training.plot(epochs, accuracy, color="tab:blue", label="test accuracy")
    training.plot(epochs[epochs_before:], during["sparsity"], color="tab:orange", label="sparsity")
    training.axvline(epochs_before + 0.5, color="gray", linewidth=0.8, linestyle=":")
    training.text(epochs_before + 0.6, 0.04, "pruning starts", color="gray", fontsize=8)
    training.set(xlabel="epoch", ylim=(0, 1.02), title="Pruning while training")
    training.legend(loc="center right")

    exported = rows[1:]
    names = [row["model"].split("'")[1] for row in exported]
    colors = ["tab:gray", "tab:green", "tab:blue"]
    size.bar(names, [row["file_bytes"] / 1e6 for row in exported], color=colors)
    size.set(ylabel="MB on disk", title="Size of the export")
    positions = np.arange(len(LATENCY_BATCH_SIZES))
    for index, (row, name, color) in enumerate(zip(exported, names, colors)):
        speed_up = [row[f"speed_up_batch_{batch}"] for batch in LATENCY_BATCH_SIZES]
        bars = latency.bar(positions + (index - 1) * 0.27, speed_up, 0.25, label=name, color=color)
        latency.bar_label(bars, fmt="%.1f", fontsize=8)
    latency.set_xticks(positions, [f"batch {batch}" for batch in LATENCY_BATCH_SIZES])
    latency.set(ylabel="speed-up over the dense export", title="Speed")
    latency.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
