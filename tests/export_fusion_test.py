"""Exports of models whose layers are computed together, against the models as they are."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks
from keras_sparse.engine import timing
from keras_sparse.initializers import RandomMask

L = keras.layers


def conv(filters=6, size=3, **options):
    return ks.layers.SparseConv2D(filters, size, **{"padding": "same", **options})


def randomized(model):
    """Give a model weights that every part of it shows in, and prune its sparse layers."""
    generator = np.random.default_rng(7)
    for layer in model._flatten_layers():
        if isinstance(layer, L.BatchNormalization):
            layer.set_weights([generator.random(w.shape) + 0.5 for w in layer.get_weights()])
        elif isinstance(layer, ks.layers.BaseSparse):
            layer.assign_mask(np.asarray(RandomMask(0.5, seed=1)(layer.mask.shape)))
            if layer.bias is not None:
                layer.bias.assign(generator.standard_normal(layer.bias.shape))
    return model


def ops_of(path):
    """Return how often each op is in the exported graph."""
    concrete = tf.saved_model.load(str(path)).signatures["serving_default"]
    graph = concrete.graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return {name: sum(node.op == name for node in nodes) for name in {node.op for node in nodes}}


FUSED = {
    "connection": ("KerasSparse>FusedConnectionConv2D", "KerasSparse>MaxPooledConnectionConv2D"),
    "thinned": ("KerasSparse>FusedThinnedConv2D",),
}
# What would be left of layers that did not become part of an op.
LEFT = ("BiasAdd", "Relu", "Relu6", "AddV2", "Mul", "Rsqrt", "Pad", "FusedBatchNormV3")


def check(tmp_path, model, fused=None, left=0, backends=("op", "thinned", "compact", "dense")):
    """Export the model in each way and compare; `left` ops must remain beside `fused` ones."""
    randomized(model)
    structure = model.input_shape if isinstance(model.input_shape, list) else [model.input_shape]
    generator = np.random.default_rng(8)
    inputs = [generator.standard_normal((3, *shape[1:])).astype("float32") for shape in structure]
    inputs = inputs if len(inputs) > 1 else inputs[0]
    expected = keras.tree.flatten(model.predict(inputs, verbose=0))
    for backend in backends:
        path = tmp_path / backend
        if backend in ("op", "thinned"):
            ks.export(model, path, "op", routine={"op": "connection"}.get(backend, backend), verbose=False)
        else:
            ks.export(model, path, backend, routine={"dense": "auto"}.get(backend, backend), verbose=False)
        for got, wanted in zip(keras.tree.flatten(ks.load(path)(inputs)), expected):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=backend)
        if backend in ("op", "thinned") and fused is not None:
            counts = ops_of(path)
            names = FUSED["connection" if backend == "op" else "thinned"]
            assert sum(counts.get(name, 0) for name in names) == fused, counts
            assert sum(counts.get(name, 0) for name in LEFT) == left, counts
    return expected


def block(x, position, activation):
    y = L.ReLU()(L.BatchNormalization()(conv(4, use_bias=False)(x)))
    y = L.BatchNormalization()(conv(4, use_bias=False)(y))
    return activation(L.Add()([y, x] if position == 0 else [x, y]))


def test_a_plain_network(tmp_path):
    inputs = keras.Input((9, 8, 4))
    x = L.ReLU()(L.BatchNormalization()(conv(7)(inputs)))
    x = L.MaxPooling2D()(L.Activation("relu6")(L.BatchNormalization()(conv(19, use_bias=False)(x))))
    x = conv(5, (1, 1), activation="relu", strides=2)(x)
    x = L.ReLU()(L.BatchNormalization()(ks.layers.SparseDense(8)(L.Flatten()(x))))
    check(tmp_path, keras.Model(inputs, ks.layers.SparseDense(3, activation="softmax")(x)), fused=5)


def test_pooling_is_part_of_the_op(tmp_path):
    inputs = keras.Input((16, 12, 4))
    x = L.MaxPooling2D()(L.ReLU()(L.BatchNormalization()(conv(17)(inputs))))
    x = L.MaxPooling2D(2)(L.Dropout(0.1)(conv(5, activation="relu6")(x)))
    x = L.MaxPooling2D(3)(L.ZeroPadding2D(1)(conv(6, 1)(x)))  # not next to its convolution
    check(tmp_path, keras.Model(inputs, x), fused=3, left=1, backends=("op",))
    counts = ops_of(tmp_path / "op")
    assert counts["KerasSparse>MaxPooledConnectionConv2D"] == 2 and counts["MaxPool"] == 1
    check(tmp_path, keras.Model(inputs, x))
    counts = ops_of(tmp_path / "thinned")
    assert counts["KerasSparse>FusedThinnedConv2D"] == 3 and counts["MaxPool"] == 3


def test_pooling_of_channels_first(tmp_path):
    inputs = keras.Input((4, 12, 8))
    x = conv(17, data_format="channels_first", activation="relu")(inputs)
    x = conv(5, data_format="channels_first")(L.MaxPooling2D(data_format="channels_first")(x))
    model = randomized(keras.Model(inputs, L.MaxPooling2D(3, data_format="channels_first")(x)))
    ks.export(model, tmp_path / "op", "op", routine="connection", verbose=False)
    x = np.random.default_rng(3).standard_normal((2, 4, 12, 8)).astype("float32")
    # TensorFlow has no convolution of channels first on CPUs: the same model of channels last says what comes out.
    inputs = keras.Input((12, 8, 4))
    y = L.MaxPooling2D()(conv(17, activation="relu")(inputs))
    twin = keras.Model(inputs, L.MaxPooling2D(3)(conv(5)(y)))
    twin.set_weights(model.get_weights())
    expected = np.transpose(twin.predict(np.transpose(x, (0, 2, 3, 1)), verbose=0), (0, 3, 1, 2))
    np.testing.assert_allclose(ks.load(tmp_path / "op")(x), expected, atol=1e-4 * np.abs(expected).max())


def test_a_sequential_network_with_a_sequential_block(tmp_path):
    layers = [conv(), L.BatchNormalization(), L.Dropout(0.5), L.ReLU()]
    model = keras.Sequential([L.Input((8, 8, 4)), keras.Sequential(layers), conv(3), L.BatchNormalization()])
    check(tmp_path, model, fused=2)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("activation", [L.ReLU, lambda: L.Activation("relu6")])
def test_residual_blocks(tmp_path, position, activation):
    inputs = keras.Input((8, 9, 4))
    x = block(block(inputs, position, activation()), position, activation())
    shortcut = L.BatchNormalization()(conv(6, 1, strides=2)(x))
    y = L.BatchNormalization()(conv(6, strides=2)(L.ReLU()(conv(5)(x))))
    model = keras.Model(inputs, L.ReLU()(L.add([y, shortcut] if position == 0 else [shortcut, y])))
    check(tmp_path, model, fused=7)


def test_normalisation_before_the_convolution(tmp_path):
    inputs = keras.Input((8, 9, 4))
    x = conv(4)(L.ReLU()(L.BatchNormalization()(inputs)))
    x = L.Add()([inputs, conv(4)(L.ReLU()(L.BatchNormalization()(x)))])
    check(tmp_path, keras.Model(inputs, x))


@pytest.mark.parametrize(("scale", "center"), [(False, True), (True, False), (False, False)])
def test_normalisation_without_its_weights(tmp_path, scale, center):
    inputs = keras.Input((8, 9, 4))
    x = L.BatchNormalization(scale=scale, center=center)(conv(use_bias=False)(inputs))
    check(tmp_path, keras.Model(inputs, x), fused=1)


def test_activation_before_the_normalisation(tmp_path):
    inputs = keras.Input((8, 9, 4))
    x = L.BatchNormalization()(conv(activation="relu")(inputs))
    x = L.BatchNormalization()(conv(activation="elu")(x))
    check(tmp_path, keras.Model(inputs, L.ReLU()(x)))


def test_shared_layers(tmp_path):
    inputs = keras.Input((8, 9, 4))
    shared, relu, normalization = conv(4), L.ReLU(), L.BatchNormalization()
    x = normalization(relu(shared(normalization(relu(shared(inputs))))))
    check(tmp_path, keras.Model(inputs, L.Add()([relu(conv(4)(x)), x])))


def test_two_readers_and_outputs_in_the_middle(tmp_path):
    inputs = keras.Input((8, 9, 4))
    x = conv(4)(inputs)
    y = L.BatchNormalization()(x)
    z = L.ReLU()(L.Add()([y, x]))
    w = L.BatchNormalization()(conv(4)(z))
    check(tmp_path, keras.Model(inputs, [z, w, L.ReLU()(w)]))


def test_other_layers_stay(tmp_path):
    inputs = keras.Input((8, 9, 4))
    x = L.ReLU()(L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same")(inputs)))
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3, padding="same")(x)))
    x = L.ELU()(L.Add()([x, conv(4)(x)]))
    check(tmp_path, keras.Model(inputs, x))


def test_channels_first(tmp_path, channels_first_on_cpu):
    inputs = keras.Input((4, 8, 7))
    options = dict(data_format="channels_first", use_bias=False)
    x = L.ZeroPadding2D(((1, 0), (2, 1)), data_format="channels_first")(inputs)
    x = L.ReLU()(L.BatchNormalization(axis=1)(conv(4, (2, 4), padding="valid", **options)(x)))
    x = L.ReLU()(L.Add()([inputs, x]))
    last = ks.layers.SparseConv2D(3, 3, data_format="channels_first", activation="softmax")
    model = randomized(keras.Model(inputs, last(x)))
    check(tmp_path, model)


def test_groups(tmp_path):
    inputs = keras.Input((8, 7, 4))
    check(tmp_path, keras.Model(inputs, L.ReLU()(L.BatchNormalization()(conv(6, groups=2)(inputs)))))


def test_padding_layers(tmp_path):
    inputs = keras.Input((8, 9, 4))
    x = L.ZeroPadding2D(((1, 2), (0, 3)))(inputs)
    x = L.ReLU()(conv(5, strides=2, padding="valid")(x))
    x = conv(5, 3, padding="valid", activation="relu")(L.ZeroPadding2D(1)(x))
    check(tmp_path, keras.Model(inputs, L.Add()([x, conv(5, padding="valid")(L.ZeroPadding2D(1)(x))])), fused=3)


def test_unknown_sizes(tmp_path):
    inputs = keras.Input((None, None, 4))
    x = L.ReLU()(L.BatchNormalization()(conv(4, padding="valid")(L.ZeroPadding2D(1)(inputs))))
    model = randomized(keras.Model(inputs, L.ReLU()(L.Add()([x, inputs]))))
    ks.export(model, tmp_path / "m", routine="connection", verbose=False)
    images = np.random.default_rng(1).standard_normal((2, 7, 6, 4)).astype("float32")
    np.testing.assert_allclose(ks.load(tmp_path / "m")(images), model.predict(images, verbose=0), atol=1e-5)


def test_units_are_measured_as_they_run(tmp_path, monkeypatch):
    """A unit is called with what comes before its padding and, in the order of its addition, its residual."""
    seen = []

    def fake(functions, shapes, *args, **options):
        tensors = [tf.zeros(shape) for shape in shapes]
        outputs = {name: tf.nest.flatten(function(*tensors))[0].shape for name, function in functions.items()}
        assert len(set(map(tuple, outputs.values()))) == 1
        seen.append(([tuple(shape) for shape in shapes], tuple(outputs["dense"])))
        return {name: 0.5 if name in ("connection", "op") else 1.0 for name in functions}

    monkeypatch.setattr(timing, "alternate", fake)
    inputs = keras.Input((8, 9, 5))
    x = conv(4, padding="valid")(L.ZeroPadding2D(1)(inputs))
    x = L.Add()([inputs[..., :4], L.BatchNormalization()(x)])
    model = randomized(keras.Model(inputs, ks.layers.SparseDense(3)(x)))
    plan = ks.export(model, tmp_path / "m", batch_size=(1, 2), verbose=False)
    assert {layer["routine"] for layer in plan["layers"].values()} == {"connection"}
    assert seen[:4] == [
        ([(1, 8, 9, 4), (1, 8, 9, 5)], (1, 8, 9, 4)),
        ([(2, 8, 9, 4), (2, 8, 9, 5)], (2, 8, 9, 4)),
        ([(1, 8, 9, 4)], (1, 8, 9, 3)),
        ([(2, 8, 9, 4)], (2, 8, 9, 3)),
    ]


def test_units_that_stay_dense_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "alternate", lambda functions, *_, **__: dict.fromkeys(functions, 1.0))
    inputs = keras.Input((8, 9, 4))
    x = L.ReLU()(L.BatchNormalization()(conv(4)(L.ZeroPadding2D(1)(inputs))))
    model = randomized(keras.Model(inputs, block(x[:, 1:-1, 1:-1], 1, L.ReLU())))
    images = np.random.default_rng(1).standard_normal((2, 8, 9, 4)).astype("float32")
    plan = ks.export(model, tmp_path / "m", verbose=False)
    assert {layer["routine"] for layer in plan["layers"].values()} == {"dense"}
    np.testing.assert_allclose(ks.load(tmp_path / "m")(images), model.predict(images, verbose=0), atol=1e-4)
    assert ops_of(tmp_path / "m").get("Rsqrt", 0) == 0


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((8, 9, 4))
    model = randomized(keras.Model(inputs, block(L.Activation("linear")(inputs), 0, L.ReLU())))
    images = np.random.default_rng(1).standard_normal((2, 8, 9, 4)).astype("float32")
    expected = model.predict(images, verbose=0).astype("float32")
    ks.export(model, tmp_path / "m", routine="connection", verbose=False)
    got = np.asarray(ks.load(tmp_path / "m")(images)).astype("float32")
    np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())
