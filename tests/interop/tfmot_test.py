"""What needs neither TFMOT nor tf_keras; models of theirs are in tests/tfmot_parity."""

import sys

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.interop.tfmot import convert_model, convert_schedule


def network():
    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    x = keras.layers.Flatten()(x)
    block = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8, name="dense")], name="block")
    return keras.Model(inputs, keras.layers.Dense(2, name="out")(block(x)))


def zero(kernel, share, seed=0):
    kernel.assign(np.asarray(kernel) * (np.random.default_rng(seed).random(kernel.shape) >= share))


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_zeros_of_a_keras_3_model_become_masks(sparsity):
    model = network()
    zero(model.get_layer("conv").kernel, sparsity)
    zero(model.get_layer("block").get_layer("dense").kernel, sparsity)
    converted = convert_model(model)
    layers = ks.selection.flatten_layers(converted)
    assert [path for path, layer in layers.items() if isinstance(layer, ks.layers.BaseSparse)] == [
        "conv",
        "block/dense",
    ]
    for path in ("conv", "block/dense"):
        kernel = np.asarray(ks.selection.flatten_layers(model)[path].kernel)
        np.testing.assert_array_equal(np.asarray(layers[path].mask), kernel != 0)
        np.testing.assert_array_equal(np.asarray(layers[path].kernel), kernel)
    x = np.random.default_rng(0).random((3, 6, 6, 2))
    np.testing.assert_allclose(converted.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    assert type(model.get_layer("conv")) is keras.layers.Conv2D


def test_layers_can_be_left_plain():
    model = network()
    for layer in (model.get_layer("conv"), model.get_layer("out")):
        zero(layer.kernel, 0.5)
    assert type(convert_model(model, exclude="out").get_layer("out")) is keras.layers.Dense
    only = convert_model(model, include="out")
    assert type(only.get_layer("conv")) is keras.layers.Conv2D
    assert isinstance(only.get_layer("out"), ks.layers.SparseDense)


def test_units_are_kept_where_any_weight_is():
    model = network()
    kernel = np.asarray(model.get_layer("conv").kernel).copy()
    kernel[:, :, 1, 2] = 0
    kernel[0, 0] = 0
    model.get_layer("conv").kernel.assign(kernel)
    layer = convert_model(model, granularity="connection").get_layer("conv")
    assert layer.mask.shape == (1, 1, 2, 4) and float(np.asarray(layer.mask).sum()) == 7


def test_what_nothing_was_pruned_of():
    model = network()
    model.get_layer("out").kernel.assign(np.zeros((8, 2)))  # an untrained layer, not a pruned one
    converted = convert_model(model)
    assert converted is not model
    assert not any(isinstance(layer, ks.layers.BaseSparse) for layer in converted.layers)


def test_schedules_from_their_configuration():
    options = {"initial_sparsity": 0.1, "final_sparsity": 0.9, "begin_step": 5, "end_step": 25, "frequency": 10}
    given = {"class_name": "PolynomialDecay", "config": {**options, "power": 2}}
    expected = ks.schedules.PolynomialDecay(0.1, 0.9, 4, 24, power=2, frequency=10)
    assert convert_schedule(given) == expected
    constant = {"target_sparsity": 0.5, "begin_step": 0, "end_step": -1, "frequency": 100}
    assert convert_schedule({"class_name": "ConstantSparsity", "config": constant}) == ks.schedules.ConstantSparsity(
        0.5, 0
    )


def test_neither_package_is_imported(run_python):
    script = (
        "import sys, keras_sparse; print('tf_keras' in sys.modules, 'tensorflow_model_optimization' in sys.modules)"
    )
    assert run_python(script).split() == ["False", "False"]
    assert "keras_sparse.interop.tfmot" in sys.modules
