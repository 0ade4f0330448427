"""Models of every shape that surgery must follow, small and with weights that are nowhere their defaults."""

import pathlib
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse import selection

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for channel_models.py


def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 7, 3)),
            layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv1"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(name="relu"),
            layers.DepthwiseConv2D(3, name="depthwise"),
            layers.Conv2D(6, (1, 2), strides=2, groups=2, activation="relu", name="conv2"),
            layers.Flatten(name="flat"),
            layers.Dropout(0.5, name="drop"),
            layers.Dense(3, activation="softmax", name="logits"),
        ],
        name="sequential",
    )


def sequential_called():
    model = keras.Sequential([layers.Conv2D(4, 3, name="conv"), layers.Flatten(), layers.Dense(3)], name="called")
    model(np.zeros((2, 8, 7, 3), "float32"))
    return model


def sequential_built():
    model = keras.Sequential([layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization()], name="built")
    model.build((None, 8, 7, 3))
    return model


def residual():
    inputs = keras.Input((8, 7, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    y = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, padding="same", name="conv")(x), training=False)
    x = layers.Add(name="sum")([x, y])
    x = layers.Concatenate(name="concat")([x, layers.Conv2D(2, 1, activation="relu", name="side")(x)])
    x = keras.ops.relu(x) * 2.0 + x[..., :1]  # operations that are no layers
    x = layers.Lambda(lambda t: t - 1.0, name="shift")(x)
    return keras.Model(inputs, layers.Dense(3, name="logits")(layers.GlobalAveragePooling2D()(x)), name="residual")


def nested():
    leaf = keras.Sequential([keras.Input((8, 7, 4)), layers.Conv2D(4, 3, padding="same", name="conv")], name="leaf")
    inputs = keras.Input((8, 7, 4))
    branch = keras.Model(inputs, leaf(inputs) + layers.Conv2D(4, 1, name="conv")(inputs), name="branch")
    inputs = keras.Input((8, 7, 3))
    x = branch(layers.Conv2D(4, 1, name="stem")(inputs))
    return keras.Model(inputs, layers.Dense(3, name="logits")(layers.Flatten()(x)), name="nested")


def shared_layer():
    inputs = keras.Input((8, 7, 3))
    shared = layers.Conv2D(3, 3, padding="same", activation="tanh", name="shared")
    return keras.Model(inputs, shared(layers.AveragePooling2D(1)(shared(inputs))), name="shared_layer")


def shared_with_nested():
    inputs = keras.Input((8, 7, 3))
    shared = layers.Conv2D(3, 3, padding="same", name="shared")
    norm = layers.BatchNormalization(name="norm")
    one = keras.Sequential([keras.Input((8, 7, 3)), shared, layers.ReLU()], name="one")
    inner = keras.Input((8, 7, 3))
    two = keras.Model(inner, norm(layers.Conv2D(3, 1, name="own")(shared(inner))), name="two")
    return keras.Model(inputs, norm(shared(two(one(inputs)))), name="shared_with_nested")


def nested_twice():
    block = keras.Sequential(
        [keras.Input((8, 7, 3)), layers.Conv2D(3, 3, padding="same", name="conv"), layers.BatchNormalization()],
        name="block",
    )
    inputs = keras.Input((8, 7, 3))
    return keras.Model(inputs, block(layers.ReLU()(block(inputs))), name="nested_twice")


def many_inputs():
    image, vector = keras.Input((8, 7, 3), name="image"), keras.Input((5,), name="vector")
    x = layers.Flatten()(layers.Conv2D(2, 3, name="conv")(image))
    y = layers.Dense(4, activation="relu", name="embed")(vector)
    both = layers.Concatenate()([x, y])
    return keras.Model([image, vector], [layers.Dense(3, name="first")(both), layers.Dense(2, name="second")(y)])


def dict_inputs():
    inputs = {"image": keras.Input((8, 7, 3), name="image"), "vector": keras.Input((5,), name="vector")}
    x = layers.Flatten()(layers.Conv2D(2, 3, name="conv")(inputs["image"]))
    y = layers.Dense(4, activation="relu", name="embed")(inputs["vector"])
    outputs = {"a": layers.Dense(3, name="first")(x), "b": layers.Dense(2, name="second")(y)}
    return keras.Model(inputs, outputs, name="dicts")


def text():
    lookup = layers.StringLookup(output_mode="one_hot", name="lookup")
    lookup.adapt(["red", "green", "blue"])
    scale = layers.Normalization(name="scale")
    scale.adapt(np.random.default_rng(3).normal(4.0, 3.0, (30, 5)).astype("float32"))
    word, vector = keras.Input((1,), dtype="string", name="word"), keras.Input((5,), name="vector")
    x = layers.Concatenate()([lookup(word), scale(vector)])
    return keras.Model([word, vector], layers.Dense(3, name="dense")(x), name="text")


def wrapped():
    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.TimeDistributed(layers.Dense(3, name="inner"), name="steps")(x)
    x = layers.Reshape((6, 15))(x)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    return keras.Model(inputs, layers.Bidirectional(layers.LSTM(2), name="both")(x), name="wrapped")


def low_precision():
    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(4, 3, dtype="mixed_float16", name="half")(inputs)
    x = layers.Conv2D(4, 3, dtype="bfloat16", name="brain")(x)
    return keras.Model(inputs, layers.Dense(3, dtype="float32", name="full")(layers.Flatten()(x)), name="low")


MODELS = [
    sequential,
    sequential_called,
    sequential_built,
    residual,
    nested,
    shared_layer,
    shared_with_nested,
    nested_twice,
    many_inputs,
    dict_inputs,
    text,
    wrapped,
    low_precision,
]


def _fill(model):
    rng = np.random.default_rng(len(model.name))
    for variable in model.weights:
        if variable.name in ("variance", "moving_variance", "mean", "count"):  # adapted, or positive
            if variable.name == "moving_variance":
                variable.assign(rng.uniform(0.5, 2.0, variable.shape))
        else:
            variable.assign(rng.normal(0.0, 0.3, variable.shape))


@pytest.fixture(params=MODELS, ids=lambda build: build.__name__)
def model(request):
    model = request.param()
    _fill(model)
    return model


@pytest.fixture(scope="session")
def models():
    """Return {name: function that makes the model with its weights filled}."""

    def filled(build):
        def make():
            model = build()
            _fill(model)
            return model

        return make

    return {build.__name__: filled(build) for build in MODELS}


@pytest.fixture(scope="session")
def inputs_of():
    """Return a function that makes inputs for a model, in the structure it takes."""

    def make(model, batch=3):
        rng = np.random.default_rng(11)

        def one(spec):
            if keras.backend.standardize_dtype(spec.dtype) == "string":
                import tensorflow as tf

                return tf.constant(rng.choice(["red", "blue", "pink"], (batch, *spec.shape[1:])))
            return keras.ops.convert_to_tensor(rng.normal(size=(batch, *spec.shape[1:])).astype("float32"))

        structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        return keras.tree.map_structure(one, structure)

    return make


@pytest.fixture(scope="session")
def prune():
    """Return a function that prunes every sparse layer of a model to random masks."""

    def prune(model, sparsity=0.5):
        rng = np.random.default_rng(5)
        for layer in selection.flatten_layers(model).values():
            if isinstance(layer, ks.layers.BaseSparse):
                layer.mask.assign((rng.random(layer.mask.shape) >= sparsity).astype("float32"))
        return model

    return prune


@pytest.fixture(scope="session")
def assert_same_outputs():
    """Return a check that two models give the same outputs, bit for bit, in the same structure."""

    def check(ours, theirs, x, **tolerance):
        ours, theirs = ours(x), theirs(x)
        keras.tree.assert_same_structure(ours, theirs)
        for a, b in zip(keras.tree.flatten(ours), keras.tree.flatten(theirs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, **{"rtol": 0, "atol": 0, **tolerance})
            assert np.ptp(np.asarray(b, "float32")) > 0, "a test of constant outputs proves nothing"

    return check
