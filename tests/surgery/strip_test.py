"""strip: plain Keras layers with the outputs of the pruned ones, for a world without keras_sparse."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse import selection
from keras_sparse.layers import BaseSparse, SparseConv2D, SparseDense


def flat(model):
    """Return the layers by path; composite layers number the names of their own parts anew in each copy."""
    layers = selection.flatten_layers(model)
    return {re.sub(r"(/\w+?)_\d+$", r"\1", path): layer for path, layer in layers.items()}


def test_any_model(model, inputs_of, prune, assert_same_outputs):
    sparse, x = ks.sparsify(model, "weight"), inputs_of(model)
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        plain = ks.strip(prune(sparse, sparsity))
        if sparsity < 1:
            assert_same_outputs(plain, sparse, x)
        else:
            keras.tree.map_structure(np.testing.assert_array_equal, plain(x), sparse(x))
    assert {path: type(layer) for path, layer in flat(plain).items()} == {
        path: type(layer) for path, layer in flat(model).items()
    }
    for path, layer in flat(sparse).items():
        twin = flat(plain)[path]
        if isinstance(layer, BaseSparse):
            np.testing.assert_array_equal(twin.kernel, layer.kernel)
            config = layer.get_config()
            del config["granularity"], config["mask_initializer"]
            assert twin.get_config() == config
        assert (twin.trainable, twin.dtype_policy) == (layer.trainable, layer.dtype_policy)
    assert not {id(v) for v in plain.variables} & {id(v) for v in sparse.variables}


def test_round_trip(model, inputs_of, assert_same_outputs):
    again = ks.strip(ks.sparsify(model))
    assert type(again) is type(model)
    for ours, theirs in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_same_outputs(again, model, inputs_of(model))
    for path, layer in flat(model).items():
        if "/" not in path:
            assert flat(again)[path].get_config() == layer.get_config()


def test_a_plain_model_is_copied(models, inputs_of, assert_same_outputs):
    model = models["sequential"]()
    copy = ks.strip(model)
    assert copy is not model
    assert_same_outputs(copy, model, inputs_of(model))


def test_masked_weights_are_gone_for_good(models, prune):
    sparse = prune(ks.sparsify(models["sequential"](), "weight"))
    raw = np.asarray(sparse.get_layer("conv1")._kernel)
    mask = np.asarray(sparse.get_layer("conv1").mask)
    assert raw[mask == 0].all(), "the variable still holds the pruned weights: that is the test's point"
    assert not np.asarray(ks.strip(sparse).get_layer("conv1").kernel)[mask == 0].any()


def test_lora_is_merged():
    inputs = keras.Input((6, 5, 2))
    x = SparseConv2D(3, 2, lora_rank=2, name="conv")(inputs)
    model = keras.Model(inputs, SparseDense(2, lora_rank=1, name="dense")(x))
    for layer in (model.get_layer("conv"), model.get_layer("dense")):
        layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
        layer.mask.assign(ks.initializers.RandomMask(0.5)(layer.mask.shape))
    plain = ks.strip(model)
    assert len(plain.weights) == 4 and not plain.get_layer("dense").lora_enabled
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 2)).astype("float32")
    np.testing.assert_allclose(plain(x), model(x), rtol=1e-6, atol=1e-6)


def test_compile_state(models):
    sparse = ks.sparsify(models["sequential"]())
    sparse.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    plain = ks.strip(sparse)
    assert plain.compiled and plain.loss == "mse" and float(plain.optimizer.learning_rate) == np.float32(0.02)


def test_subclasses_of_sparse_layers_become_the_plain_class():
    @keras.saving.register_keras_serializable(package="strip_test")
    class Own(SparseDense):
        pass

    model = keras.Sequential([keras.Input((4,)), Own(3)])
    assert type(ks.strip(model).layers[0]) is layers.Dense


def test_sparse_layers_inside_wrappers_are_refused():
    inner = SparseConv2D(2, 3, name="inner")
    model = keras.Sequential([keras.Input((2, 6, 6, 3)), layers.TimeDistributed(inner, name="steps")], name="net")
    with pytest.raises(ValueError, match="`model` must .*'steps/inner'.*Received: model='net'"):
        ks.strip(model)


ELSEWHERE = """
import sys
import numpy as np
import keras
folder = sys.argv[1]
x = np.load(f"{folder}/x.npy")
for name in sys.argv[2:]:
    model = keras.models.load_model(f"{folder}/{name}.keras")
    np.testing.assert_allclose(model(x), np.load(f"{folder}/{name}.npy"), rtol=1e-6, atol=1e-6)
assert "keras_sparse" not in sys.modules
print("equal without keras_sparse")
"""


def test_files_load_where_keras_sparse_is_not_imported(models, prune, run_python, tmp_path):
    names = ["sequential", "nested", "nested_twice"]
    x = np.random.default_rng(0).normal(size=(2, 8, 7, 3)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    for name in names:
        sparse = prune(ks.sparsify(models[name]()))
        ks.strip(sparse).save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}.npy", sparse(x))
    assert "equal without" in run_python(ELSEWHERE, tmp_path, *names)


def test_a_real_network_end_to_end(prune):
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=7)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(rng.normal(0.0, 0.1, layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.8, 1.2, layer.moving_variance.shape))
    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    sparse = ks.sparsify(model, exclude="predictions")
    exchanged = [layer for layer in sparse.layers if isinstance(layer, BaseSparse)]
    assert len(exchanged) == sum(type(layer) is layers.Conv2D for layer in model.layers) == 35
    np.testing.assert_array_equal(sparse(x), model(x))
    prune(sparse)
    plain = ks.strip(sparse)
    pruned = np.asarray(sparse(x))
    np.testing.assert_array_equal(plain(x), pruned)
    assert not np.array_equal(pruned, model(x))
    assert not any(isinstance(layer, BaseSparse) for layer in plain.layers)
    assert [layer.name for layer in plain.layers] == [layer.name for layer in model.layers]
    kept = sum(int(np.count_nonzero(layer.kernel)) for layer in exchanged)
    total = sum(int(np.prod(layer._kernel.shape)) for layer in exchanged)
    assert 0.45 < kept / total < 0.55
