"""Sparse layers in the ways Keras runs a layer: traced, compiled by XLA, eager, wrapped, on unknown sizes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks
from keras_sparse.layers import SparseConv2D, SparseDense

X = np.random.default_rng(0).normal(size=(8, 5, 6, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")


def network(random_mask):
    model = keras.Sequential(
        [
            keras.Input((5, 6, 3)),
            SparseConv2D(4, 3, strides=2, padding="same", granularity="weight", activation="relu", name="conv"),
            keras.layers.Flatten(),
            SparseDense(2, granularity="channel", name="dense"),
        ]
    )
    for name in ("conv", "dense"):
        layer = model.get_layer(name)
        layer.mask.assign(random_mask(layer.mask.shape, 0.5, seed=len(name)))
    return model


def zeros_of(layer):
    return np.broadcast_to(np.asarray(layer.mask), layer._kernel.shape) == 0


def trained(random_mask, **options):
    keras.utils.set_random_seed(7)
    model = network(random_mask)
    model.compile(keras.optimizers.AdamW(0.05), "mse", **options)
    model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model


@pytest.fixture(scope="module")
def reference(random_mask):
    return trained(random_mask, jit_compile=False)


@pytest.mark.parametrize(
    "options",
    [{"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 2}],
    ids=str,
)
def test_ways_to_train_agree(options, reference, random_mask):
    model = trained(random_mask, **options)
    assert model.jit_compile == options.get("jit_compile", model.jit_compile)
    for name in ("conv", "dense"):
        layer, twin = model.get_layer(name), reference.get_layer(name)
        assert layer.supports_jit
        assert not np.asarray(layer._kernel)[zeros_of(layer)].any()
        np.testing.assert_allclose(layer.kernel, twin.kernel, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(model.predict(X, verbose=0), reference(X), rtol=1e-3, atol=1e-3)


def test_a_new_mask_reaches_a_compiled_predict(random_mask):
    model = network(random_mask)
    model.compile(jit_compile=True)
    before = model.predict(X, verbose=0)
    model.get_layer("dense").mask.assign(np.zeros(model.get_layer("dense").mask.shape))
    assert before.any()
    np.testing.assert_array_equal(model.predict(X, verbose=0), np.zeros((8, 2)))


def test_time_distributed(random_mask, conv2d_oracle, tmp_path):
    layer = SparseConv2D(2, 3, granularity="weight", name="conv")
    model = keras.Sequential([keras.Input((4, 5, 6, 3)), keras.layers.TimeDistributed(layer, name="steps")])
    layer.mask.assign(random_mask(layer.mask.shape, 0.5))
    x = np.random.default_rng(2).normal(size=(2, 4, 5, 6, 3)).astype("float32")
    expected = conv2d_oracle(x.reshape(-1, 5, 6, 3), layer.kernel).reshape(2, 4, 3, 4, 2)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    model.compile(keras.optimizers.AdamW(0.1), "mse")
    model.fit(x, np.ones(expected.shape), verbose=0)
    assert not np.asarray(layer._kernel)[zeros_of(layer)].any()
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(again(x), model(x))
    np.testing.assert_array_equal(again.get_layer("steps").layer.mask, layer.mask)


@pytest.mark.parametrize("granularity", ks.granularity.names())
def test_symbolic_inputs_of_unknown_sizes(granularity, random_mask, conv2d_oracle):
    inputs = keras.Input((None, None, 3))
    layer = SparseConv2D(4, 3, strides=2, padding="same", granularity=granularity)
    outputs = layer(inputs)
    assert outputs.shape == (None, None, None, 4)
    layer.mask.assign(random_mask(layer.mask.shape, 0.5))
    model = keras.Model(inputs, outputs)
    for size in ((5, 6), (4, 9), (1, 1)):
        x = np.random.default_rng(3).normal(size=(1, *size, 3)).astype("float32")
        expected = conv2d_oracle(x, layer.kernel, (2, 2), "same")
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-5)


def test_dense_on_unknown_sizes(random_mask):
    inputs = keras.Input((None, 5))
    layer = SparseDense(3)
    outputs = layer(inputs)
    assert outputs.shape == (None, None, 3)
    layer.mask.assign(random_mask((5, 3), 0.5))
    x = np.ones((2, 4, 5), "float32")
    np.testing.assert_allclose(keras.Model(inputs, outputs)(x), x @ np.asarray(layer.kernel), rtol=1e-6)


@pytest.mark.parametrize("initializer", ["ones", ks.initializers.RandomMask(0.5, seed=3)], ids=["ones", "random"])
@pytest.mark.parametrize("make", [lambda **o: SparseConv2D(4, 3, **o), lambda **o: SparseDense(4, **o)])
def test_layers_built_inside_a_traced_function(make, initializer):
    layer = make(mask_initializer=initializer)
    traced = tf.function(layer)(X)
    np.testing.assert_allclose(traced, layer(X), rtol=1e-5, atol=1e-6)
    twin = make(mask_initializer=initializer)
    twin.build(X.shape)
    np.testing.assert_array_equal(layer.mask, twin.mask)


STRATEGY = """
import sys
import numpy as np
import tensorflow as tf
import keras
import keras_sparse as ks

device = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
folder = sys.argv[1]
data = np.load(f"{folder}/data.npz")


def trained(strategy):
    keras.utils.set_random_seed(7)
    with strategy.scope():
        model = keras.Sequential([
            keras.Input((5, 6, 3)),
            ks.layers.SparseConv2D(4, 3, granularity="weight", activation="relu", name="conv",
                                   mask_initializer=ks.initializers.RandomMask(0.5, seed=3)),
            keras.layers.Flatten(),
            ks.layers.SparseDense(2, name="dense"),
        ])
        model.compile(keras.optimizers.AdamW(0.05), "mse")
    model.get_layer("dense").assign_mask(data["first"])
    fit = lambda: model.fit(data["x"], data["y"], batch_size=4, epochs=2, shuffle=False, verbose=0)
    fit()
    model.get_layer("dense").mask.assign(data["second"])
    fit()
    return model


single = trained(tf.distribute.get_strategy())
mirrored = trained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
for name in ("conv", "dense"):
    layer, twin = mirrored.get_layer(name), single.get_layer(name)
    replicas = [[v.numpy() for v in variable.value.values] for variable in (layer._kernel, layer.mask)]
    assert len(replicas[0]) == len(replicas[1]) == 2
    for kernel, mask in zip(*replicas):
        np.testing.assert_array_equal(mask, twin.mask)
        np.testing.assert_array_equal(kernel, replicas[0][0])
        assert 0 < mask.mean() < 1 and not kernel[mask == 0].any() and kernel[mask == 1].any()
        np.testing.assert_allclose(kernel, twin._kernel, rtol=1e-3, atol=1e-4)
mirrored.save(f"{folder}/m.keras")
np.testing.assert_array_equal(keras.models.load_model(f"{folder}/m.keras")(data["x"]), mirrored(data["x"]))
print("trained on", mirrored.distribute_strategy.num_replicas_in_sync)
"""


def test_mirrored_strategy(run_python, random_mask, tmp_path):
    first = random_mask((48, 2), 0.3)
    arrays = {"x": X, "y": Y, "first": first, "second": first * random_mask((48, 2), 0.5, seed=1)}
    np.savez(tmp_path / "data.npz", **arrays)
    assert "trained on 2" in run_python(STRATEGY, tmp_path)
