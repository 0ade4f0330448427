"""What the examples that repeat a paper's experiments share: data sets, and results that survive an interruption."""

import argparse
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_sparse as ks  # noqa: E402
from keras_sparse import files  # noqa: E402
from keras_sparse.engine import machine  # noqa: E402

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")


def load_data(name, data_dir=None):
    """Return training images and labels, test images and labels of a data set.

    Args:
        name: `"digits"`, which comes inside scikit-learn, or a TFDS name of `DATASETS`.
        data_dir: Where TFDS keeps its data sets; it downloads what is not there.

    Returns:
        Four arrays: float32 images in [0, 1] of shape (examples, height, width, channels), and integer labels.
    """
    if name == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = digits.images[..., None].astype("float32") / 16.0
        split = train_test_split(images, digits.target, test_size=360, random_state=0, stratify=digits.target)
        train_x, test_x, train_y, test_y = split
        return train_x, train_y, test_x, test_y
    import tensorflow_datasets as tfds

    arrays = []
    for split in ("train", "test"):
        data = tfds.as_numpy(tfds.load(name, split=split, data_dir=data_dir, batch_size=-1))
        arrays += [data["image"].astype("float32") / 255.0, data["label"]]
    return tuple(arrays)


def add_arguments(parser, output):
    """Add the arguments that all experiments have to an `argparse` parser."""
    parser.add_argument("--data-dir", help="where TFDS keeps its data sets")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(output), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round; the others count on from it")
    parser.add_argument(
        "--threads", type=_positive, help="threads of TensorFlow; as many as there are cores by default"
    )


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, received {value}")
    return value


def set_threads(threads):
    """Bound the threads of TensorFlow; call it before anything is computed."""
    if threads is not None:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


class Results:
    """Records of runs in a JSON file; a run that is in the file is not made again.

    Each record holds the run's settings, what it returned, its command, its wall time and its process time (that of
    all threads together, which other work on the machine disturbs less), and the machine it ran on.

    Args:
        path: The file. It is written whole after each run, so an interrupted experiment goes on where it stopped.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.records = json.loads(self.path.read_text())["records"] if self.path.exists() else []

    def find(self, **settings):
        """Return the records that have all these settings."""
        settings = json.loads(json.dumps(settings))  # tuples are lists in the file
        return [r for r in self.records if all(r["settings"].get(key) == value for key, value in settings.items())]

    def run(self, function, **settings):
        """Return the record of a run with these settings; make the run where there is none.

        Args:
            function: Called with the settings as keyword arguments, after Keras's random state was set to `seed` where
                that is one of them; returns a dict for the record, of what JSON can hold.
            **settings: What tells this run from others, the seed and the length of the training among it.
        """
        found = [record for record in self.find(**settings) if len(record["settings"]) == len(settings)]
        described = ", ".join(f"{key}={value}" for key, value in settings.items())
        if found:
            print(f"[{self.path.name}] {described}: already done", flush=True)
            return found[0]
        print(f"[{self.path.name}] {described} ...", flush=True)
        keras.backend.clear_session()
        if "seed" in settings:
            keras.utils.set_random_seed(settings["seed"])
        wall, process = time.perf_counter(), time.process_time()
        outcome = function(**settings)
        record = {
            "settings": settings,
            **outcome,
            "wall_seconds": round(time.perf_counter() - wall, 2),
            "process_seconds": round(time.process_time() - process, 2),
            "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": machine.describe() | {"accelerators": _accelerators()},
            "versions": {"keras": keras.__version__, "keras_sparse": ks.__version__, "numpy": np.__version__},
            "backend": keras.backend.backend(),
        }
        record = json.loads(json.dumps(record, default=_to_plain))
        # Another process may have added to the file meanwhile.
        self.records = [*(Results(self.path).records), record]
        files.write_json(self.path, {"records": self.records})
        print(f"[{self.path.name}] {described}: {record['wall_seconds']:.0f} s", flush=True)
        return record


def _accelerators():
    """Return the names of the devices that the backend computes on beside the processor."""
    if keras.backend.backend() == "jax":
        import jax

        return [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    return keras.distribution.list_devices("gpu")


def _to_plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} cannot be written as JSON")


def mean_and_spread(values):
    """Return the mean and the standard deviation over rounds (0 for a single one)."""
    values = np.asarray(values, "float64")
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else 0.0


def markdown_table(header, rows):
    """Return a Markdown table; the first column is aligned left, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
