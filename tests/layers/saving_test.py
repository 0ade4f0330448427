"""Sparse layers in files: masks come back, masked weights are zero in them, training goes on as if uninterrupted."""

import copy
import io
import json
import pickle
import zipfile

import h5py
import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse import selection
from keras_sparse.granularity import Granularity
from keras_sparse.initializers import RandomMask
from keras_sparse.layers import SparseConv2D, SparseDense

X = np.random.default_rng(0).normal(size=(8, 6, 5, 2)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
TAPS = Granularity("taps", taps=True, inputs=False, outputs=False)


def network(kind="sequential", sparsity=0.5, units=3):
    conv = SparseConv2D(4, 3, granularity="weight", activation="relu", name="conv")
    grouped = SparseConv2D(4, (1, 2), granularity=TAPS, padding="same", name="taps")
    flatten = keras.layers.Flatten(name="flat")
    dense = SparseDense(units, granularity="group", use_bias=False, name="dense")
    if kind == "sequential":
        model = keras.Sequential([keras.Input((6, 5, 2)), conv, grouped, flatten, dense], name="net")
    else:
        inputs = keras.Input((6, 5, 2))
        block = keras.Sequential([keras.Input((6, 5, 2)), conv], name="block")
        x = block(inputs)
        model = keras.Model(inputs, dense(flatten(keras.layers.add([x, grouped(x)]))), name="net")
    for layer in (conv, grouped, dense):
        mask = RandomMask(0.0 if sparsity == 1 else sparsity, seed=3)(layer.mask.shape)
        layer.mask.assign(mask * (sparsity < 1))
    return model


def sparse_layers(model):
    layers = selection.flatten_layers(model).values()
    return [layer for layer in layers if isinstance(layer, ks.layers.BaseSparse)]


def assert_equal(ours, theirs):
    np.testing.assert_array_equal(ours(X), theirs(X))
    for a, b in zip(sparse_layers(ours), sparse_layers(theirs), strict=True):
        assert a.name == b.name and a.granularity == b.granularity
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_array_equal(a.kernel, b.kernel)


def datasets(path):
    """Return {name: array} of all that the file holds."""
    if str(path).endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read("model.weights.h5"))
    else:
        content = path
    found = {}
    with h5py.File(content) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


KINDS = ["sequential", "functional"]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_model_file(kind, sparsity, tmp_path):
    model = network(kind, sparsity)
    model.save(tmp_path / "m.keras")
    assert_equal(keras.models.load_model(tmp_path / "m.keras"), model)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_file(kind, tmp_path):
    model, other = network(kind), network(kind, sparsity=0.0)
    model.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    assert_equal(other, model)


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "bfloat16"])
def test_no_stale_weight_gets_into_a_file(name, dtype, tmp_path):
    keras.config.set_dtype_policy(dtype)
    model = network(sparsity=0.0)
    layer = model.get_layer("conv")
    mask = np.asarray(RandomMask(0.5, seed=1)(layer.mask.shape))
    layer.mask.assign(mask)
    raw = np.asarray(keras.ops.cast(layer._kernel, "float32"))
    assert raw[mask == 0].all(), "the variable still holds the pruned weights: that is the test's point"
    (model.save if name.endswith("keras") else model.save_weights)(tmp_path / name)
    again = keras.models.clone_model(model)
    if name.endswith("keras"):
        again = keras.models.load_model(tmp_path / name)
    else:
        again.load_weights(tmp_path / name)
    raw = np.asarray(keras.ops.cast(again.get_layer("conv")._kernel, "float32"))
    assert not raw[mask == 0].any() and raw[mask == 1].all()
    if dtype == "float32":
        prefix = "layers/sparse_conv2d/vars/"
        stored = {
            key.removeprefix(prefix): value
            for key, value in datasets(tmp_path / name).items()
            if key.startswith(prefix)
        }
        assert set(stored) == {"0", "1", "mask"}
        np.testing.assert_array_equal(stored["0"], layer.kernel)
        np.testing.assert_array_equal(stored["mask"], mask)
        assert not any(value.shape == mask.shape and value[mask == 0].any() for value in stored.values())


def test_averaged_weights_get_into_the_file_masked(tmp_path):
    model = network()
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, "mse")
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert_equal(again, model)
    for layer in sparse_layers(again):
        pruned = np.broadcast_to(np.asarray(layer.mask), layer._kernel.shape) == 0
        assert not np.asarray(layer._kernel)[pruned].any()


def test_weights_of_the_dense_twin_load_and_the_mask_stays(tmp_path):
    shape = (None, 6, 5, 2)
    for make, dense in (
        (lambda: SparseConv2D(3, 2), keras.layers.Conv2D(3, 2)),
        (lambda: SparseDense(3), keras.layers.Dense(3)),
    ):
        sparse = make()
        sparse.build(shape), dense.build(shape)
        mask = np.asarray(RandomMask(0.5)(sparse.mask.shape))
        sparse.mask.assign(mask)
        store = {}
        dense.save_own_variables(store)
        sparse.load_own_variables(store)
        np.testing.assert_array_equal(sparse.mask, mask)
        np.testing.assert_array_equal(sparse.kernel, dense.kernel * mask)


# Configurations

CONV = {
    "filters": 6,
    "kernel_size": (2, 3),
    "strides": (2, 1),
    "padding": "same",
    "data_format": "channels_first",
    "dilation_rate": (1, 1),
    "groups": 2,
    "activation": "relu",
    "use_bias": False,
    "kernel_initializer": keras.initializers.HeNormal(seed=1),
    "bias_initializer": keras.initializers.Constant(2.0),
    "kernel_regularizer": keras.regularizers.L1(0.1),
    "bias_regularizer": keras.regularizers.L2(0.2),
    "activity_regularizer": keras.regularizers.L2(0.3),
    "kernel_constraint": keras.constraints.MaxNorm(1.5, axis=[0, 1]),
    "bias_constraint": keras.constraints.NonNeg(),
    "granularity": Granularity("rows", taps=False, inputs=True, outputs=False),
    "mask_initializer": RandomMask(0.4, seed=7),
    "name": "layer",
    "trainable": False,
    "dtype": "mixed_bfloat16",
}
ABSENT = ("filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate", "groups")
DENSE = {"units": 5, **{key: value for key, value in CONV.items() if key not in ABSENT}}
FULL = [(SparseConv2D, CONV, (None, 4, 6, 5)), (SparseDense, DENSE, (None, 5))]


def plain(value):
    """Return a value without its identity, for comparison."""
    if hasattr(value, "get_config"):
        return (type(value), json.dumps(keras.saving.serialize_keras_object(value)))
    return value


@pytest.mark.parametrize(("cls", "arguments", "shape"), FULL, ids=["conv", "dense"])
@pytest.mark.parametrize("how", ["from_config", "serialize"])
def test_every_argument_survives(cls, arguments, shape, how):
    layer = cls(**arguments)
    if how == "from_config":
        again = cls.from_config(layer.get_config())
    else:
        text = json.dumps(keras.saving.serialize_keras_object(layer))
        again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is cls and again.get_config() == layer.get_config()
    for name, value in arguments.items():
        if name == "dtype":
            assert again.dtype_policy.name == value
        elif name == "activation":
            assert again.activation is keras.activations.get(value)
        else:
            assert plain(getattr(again, name)) == plain(value), name
    layer.build(shape), again.build(shape)
    np.testing.assert_array_equal(again.mask, layer.mask)
    np.testing.assert_array_equal(again.kernel, layer.kernel)
    assert 0 < np.asarray(layer.mask).mean() < 1


def test_the_configurations_name_every_argument():
    import inspect

    for cls, arguments, _ in FULL:
        own = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
        assert own - set(arguments) <= {"lora_rank", "lora_alpha", "quantization_config"}


@pytest.mark.parametrize("granularity", [*ks.granularity.names(), TAPS], ids=str)
def test_granularity_in_the_configuration(granularity):
    layer = SparseConv2D(2, 3, granularity=granularity)
    config = layer.get_config()
    assert isinstance(config["granularity"], dict if granularity is TAPS else str)
    assert SparseConv2D.from_config(config).granularity == ks.granularity.get(granularity)


@pytest.mark.parametrize("cls", [SparseConv2D, SparseDense])
def test_lora_arguments_survive(cls):
    sizes = (4, 3) if cls is SparseConv2D else (4,)
    layer = cls(*sizes, lora_rank=2, lora_alpha=5)
    again = cls.from_config(layer.get_config())
    assert (again.lora_rank, again.lora_alpha) == (layer.lora_rank, layer.lora_alpha) == (2, 5)


@pytest.mark.skipif(not hasattr(keras.quantizers, "Int8QuantizationConfig"), reason="this Keras has none")
def test_quantization_config_survives():
    given = keras.quantizers.Int8QuantizationConfig()
    again = SparseDense.from_config(SparseDense(3, quantization_config=given).get_config())
    assert type(again.quantization_config) is type(given)


def test_lora_survives(tmp_path):
    model = keras.Sequential(
        [keras.Input((6, 5, 2)), SparseConv2D(3, 2, lora_rank=2, lora_alpha=3), SparseDense(2, lora_rank=1)]
    )
    for layer in model.layers:
        layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
        layer.mask.assign(RandomMask(0.5)(layer.mask.shape))
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert [layer.lora_rank for layer in again.layers] == [2, 1]
    np.testing.assert_allclose(again(X), model(X), rtol=1e-5, atol=1e-6)


# Copies


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_independent(kind):
    model = network(kind)
    clone = keras.models.clone_model(model)
    assert all(np.all(np.asarray(layer.mask) == 1) for layer in sparse_layers(clone))
    clone.set_weights(model.get_weights())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), clone):
        assert_equal(again, model)
        before = np.asarray(model(X))
        for layer in sparse_layers(again):
            assert layer._kernel.constraint.mask is layer.mask
            layer.assign_mask(np.zeros(layer.mask.shape))
        assert not np.array_equal(again(X), before)
        np.testing.assert_array_equal(model(X), before)


def test_copies_of_a_layer():
    layer = SparseConv2D(3, 2, granularity=TAPS, kernel_regularizer="l2")
    unbuilt = pickle.loads(pickle.dumps(layer))
    assert not unbuilt.built and unbuilt.granularity == TAPS
    layer.build((None, 6, 5, 2))
    layer.mask.assign(RandomMask(0.5)(layer.mask.shape))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(again.mask, layer.mask)
        np.testing.assert_array_equal(again(X), layer(X))
        again.mask.assign(np.zeros(layer.mask.shape))
        assert float(again.losses[0]) == 0 < float(layer.losses[0])


# Errors


def dense_network(units=3):
    return keras.Sequential(
        [keras.Input((6, 5, 2)), keras.layers.Flatten(name="flat"), keras.layers.Dense(units, name="dense")]
    )


def flat_sparse_network(units=3):
    return keras.Sequential(
        [keras.Input((6, 5, 2)), keras.layers.Flatten(name="flat"), SparseDense(units, name="dense")]
    )


def test_another_shape_raises_what_keras_raises(tmp_path):
    errors = []
    for make in (dense_network, flat_sparse_network):
        make(3).save_weights(tmp_path / "m.weights.h5")
        with pytest.raises(ValueError) as caught:
            make(4).load_weights(tmp_path / "m.weights.h5")
        errors.append(str(caught.value))
    for message in errors:
        assert "shape of the target variable" in message and "(60, 4)" in message and "(60, 3)" in message


def test_unbuilt_layers_raise_what_keras_raises(tmp_path):
    errors = []
    for make, cls in ((dense_network, keras.layers.Dense), (flat_sparse_network, SparseDense)):
        make().save_weights(tmp_path / "m.weights.h5")
        unbuilt = keras.Sequential([keras.layers.Flatten(name="flat"), cls(3, name="dense")])
        with pytest.raises(ValueError) as caught:
            unbuilt.load_weights(tmp_path / "m.weights.h5")
        errors.append(str(caught.value).split(".")[0])
    assert errors[0] == errors[1]


def test_an_unbuilt_layer_saves_nothing():
    store = {}
    SparseConv2D(3, 2).save_own_variables(store)
    assert store == {}


def test_another_granularity_is_refused_and_other_numbers_of_variables_too(tmp_path):
    model = keras.Sequential([keras.Input((6, 5, 2)), SparseConv2D(3, 2, granularity="weight", name="c")])
    model.save_weights(tmp_path / "m.weights.h5")
    other = keras.Sequential([keras.Input((6, 5, 2)), SparseConv2D(3, 2, granularity="group", name="c")])
    with pytest.raises(ValueError, match="shape of the target variable"):
        other.load_weights(tmp_path / "m.weights.h5")
    layer = SparseConv2D(3, 2, granularity="weight", use_bias=False)
    layer.build((None, 6, 5, 2))
    store = {}
    model.get_layer("c").save_own_variables(store)
    with pytest.raises(ValueError, match="expected 2 variables, but received 3"):
        layer.load_own_variables(store)


# Training on


def train(model, steps):
    for _ in range(steps):
        model.train_on_batch(X, Y)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "ema": lambda: keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(optimizer, tmp_path):
    model = network()
    model.compile(OPTIMIZERS[optimizer](), "mse")
    train(model, 2)
    layer = model.get_layer("conv")
    mask = np.asarray(layer.mask) * np.asarray(RandomMask(0.5, seed=8)(layer.mask.shape))
    if optimizer == "ema":
        layer.assign_mask(mask)  # an average would keep a trace of what `mask.assign` leaves
    else:
        layer.mask.assign(mask)  # the raw kernel is stale when the file is written, to no effect
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    train(model, 3), train(again, 3)
    assert int(again.optimizer.iterations) == 5
    for ours, theirs in zip(again.variables, model.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=theirs.path)
    for ours, theirs in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=theirs.path)


FRESH = """
import sys
import numpy as np
import keras
import keras_sparse  # registers the layers: no custom_objects
folder = sys.argv[1]
data = np.load(f"{folder}/data.npz")
for kind in ("sequential", "functional"):
    model = keras.models.load_model(f"{folder}/{kind}.keras")
    result = {"y": model(data["x"])}
    for _ in range(3):
        model.train_on_batch(data["x"], data["t"])
    result.update({f"v{i}": v for i, v in enumerate([*model.variables, *model.optimizer.variables])})
    np.savez(f"{folder}/{kind}.npz", **{key: np.asarray(value) for key, value in result.items()})
"""


def test_a_fresh_process_loads_and_trains_on_bit_for_bit(run_python, tmp_path):
    np.savez(tmp_path / "data.npz", x=X, t=Y)
    models = {kind: network(kind) for kind in KINDS}
    for kind, model in models.items():
        model.compile(keras.optimizers.AdamW(0.05), "mse")
        train(model, 2)
        model.save(tmp_path / f"{kind}.keras")
    run_python(FRESH, tmp_path)
    for kind, model in models.items():
        result = np.load(tmp_path / f"{kind}.npz")
        np.testing.assert_array_equal(result["y"], model(X))
        train(model, 3)
        for i, variable in enumerate([*model.variables, *model.optimizer.variables]):
            np.testing.assert_array_equal(result[f"v{i}"], variable, err_msg=variable.path)
