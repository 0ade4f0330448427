"""Tiny networks and data for the tests of callbacks; all names of layers are fixed, as a resumed run needs them."""

import pathlib
import sys

import keras
import numpy as np
import pytest

import keras_sparse as ks

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for interruption.py


def _mlp(kind="plain", granularity="weight", **options):
    """Kernels of 48 and 24 weights."""
    dense = keras.layers.Dense
    if kind == "sparse":
        dense, options = ks.layers.SparseDense, {"granularity": granularity, **options}
    keras.utils.set_random_seed(7)
    layers = [keras.Input((6,)), dense(8, "tanh", name="a", **options), dense(3, name="b", **options)]
    return keras.Sequential(layers, name="mlp")


def _cnn(kind="plain", granularity="connection"):
    """Kernels of 72, 24 and 18 weights; in connections, 8 of 9 weights, 24 and 18 of one."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            keras.layers.Conv2D(4, 3, activation="tanh", name="conv"),
            keras.layers.Conv2D(6, 1, activation="tanh", name="point"),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(3, name="head"),
        ],
        name="cnn",
    )
    return model if kind == "plain" else ks.sparsify(model, granularity=granularity)


def _data(model):
    generator = np.random.default_rng(3)
    x = generator.normal(size=(40, *model.input_shape[1:])).astype("float32")
    return x, generator.normal(size=(40, 3)).astype("float32")


def _fit(model, *callbacks, optimizer="adam", epochs=2, initial_epoch=0, verbose=0, **options):
    """Ten batches an epoch, always the same ones; compiles unless the model is."""
    x, y = _data(model)
    if not model.compiled:
        model.compile(optimizer, "mse", **options)
    options = {"epochs": epochs, "initial_epoch": initial_epoch, "verbose": verbose}
    return model.fit(x, y, batch_size=4, shuffle=False, callbacks=list(callbacks), **options)


class Recorder(keras.callbacks.Callback):
    """Notes kernels and masks at the end of every batch, where it stands in the list of callbacks."""

    def __init__(self, pruning):
        super().__init__()
        self.pruning = pruning
        self.steps, self.kernels, self.masks, self.logs = [], [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(int(self.model.optimizer.iterations))
        self.kernels.append({weight.name: weight.kernel() for weight in self.pruning._weights})
        self.masks.append({weight.name: weight.mask() for weight in self.pruning._weights})
        self.logs.append(dict(logs))


@pytest.fixture
def mlp():
    return _mlp


@pytest.fixture
def cnn():
    return _cnn


@pytest.fixture
def data():
    return _data


@pytest.fixture
def fit():
    return _fit


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture(params=["sparse", "plain"])
def kind(request):
    return request.param
