import json
import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks
from keras_sparse import export as export_function
from keras_sparse.engine import timing
from keras_sparse.initializers import RandomMask

# `ks.export` is the function; the module of that name is reached through sys.modules.
export_module = sys.modules["keras_sparse.export"]

RUN_WITH_STOCK_TENSORFLOW = """
import sys
import warnings
import numpy as np
import tensorflow as tf
path, inputs, outputs, library = sys.argv[1:]
if library:
    tf.load_op_library(library)
serve = tf.saved_model.load(path).signatures["serving_default"]
(name,) = serve.structured_input_signature[1]
np.save(outputs, serve(**{name: tf.constant(np.load(inputs))})["output_0"].numpy())
assert "keras_sparse" not in sys.modules
"""


def prune(model, sparsity):
    """Prune every sparse layer of a model at random."""
    for index, layer in enumerate(model.layers):
        if isinstance(layer, ks.layers.BaseSparse):
            layer.assign_mask(np.asarray(RandomMask(sparsity, seed=index)(layer.mask.shape)))
        elif isinstance(layer, keras.Model):
            prune(layer, sparsity)
    return model


def network(granularity="connection", sparsity=0.8):
    """Convolutions of several kinds, a nested model, a shared layer, normalisation, a residual add."""
    inputs = keras.Input((9, 7, 3), name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    x = keras.layers.BatchNormalization()(x)
    shared = keras.layers.Conv2D(8, (1, 3), padding="same", use_bias=False)
    x = keras.layers.add([shared(x), shared(shared(x))])
    block = keras.Sequential([keras.layers.Input((9, 7, 8)), keras.layers.Conv2D(12, 3, strides=2, groups=2)])
    x = keras.layers.Conv2D(10, 2, dilation_rate=2, activation="elu")(block(x))
    x = keras.layers.Dense(5, activation="tanh")(x)
    outputs = keras.layers.Dense(4)(keras.layers.Flatten()(x))
    return prune(ks.sparsify(keras.Model(inputs, outputs), granularity), sparsity)


def examples(model, batch=3):
    return np.random.default_rng(1).standard_normal((batch, *model.input_shape[1:])).astype("float32")


def assert_close(got, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * max(scale, 1e-3))


@pytest.mark.parametrize("granularity", ["connection", "group", "weight", "feature_map", "channel"])
@pytest.mark.parametrize(
    ("backend", "routine"), [("op", "connection"), ("op", "thinned"), ("compact", "compact"), ("dense", "auto")]
)
def test_exports_compute_what_the_model_computes(tmp_path, backend, routine, granularity):
    model = network(granularity, 0.6)
    plan = ks.export(model, tmp_path / "m", backend, routine=routine, verbose=False)
    for batch in (1, 5):
        inputs = examples(model, batch)
        assert_close(ks.load(tmp_path / "m")(inputs).numpy(), model.predict(inputs, verbose=0))
    used = {layer["routine"] for layer in plan["layers"].values()}
    if routine == "connection":
        assert used == {"connection"} and len(plan["layers"]) == 6
    elif routine == "thinned":  # grouped convolutions have no lowered matrix of their own
        assert used == {"thinned", "dense"}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("routine", ["connection", "thinned", "compact"])
def test_any_sparsity(tmp_path, routine, sparsity):
    inputs = keras.Input((6, 5, 4))
    layer = ks.layers.SparseConv2D(9, 3, activation="relu", bias_initializer="ones", granularity="group")
    model = keras.Model(inputs, layer(inputs))
    mask = np.zeros(layer.mask.shape) if sparsity == 1 else RandomMask(sparsity)(layer.mask.shape)
    layer.assign_mask(np.asarray(mask))
    backend = "compact" if routine == "compact" else "op"
    ks.export(model, tmp_path / "m", backend, routine=routine, verbose=False)
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))


@pytest.mark.parametrize("backend", ["op", "compact", "dense"])
def test_a_fresh_process_with_stock_tensorflow_serves_the_export(tmp_path, backend):
    model = network()
    routine = {"op": "connection", "compact": "compact", "dense": "auto"}[backend]
    ks.export(model, tmp_path / "m", backend, routine=routine, verbose=False)
    np.save(tmp_path / "x.npy", examples(model))
    library = ks.ops.library_path() if backend == "op" else ""
    command = [sys.executable, "-c", RUN_WITH_STOCK_TENSORFLOW, tmp_path / "m", tmp_path / "x.npy", tmp_path / "y.npy"]
    subprocess.run([*map(str, command), library], check=True, cwd=tmp_path)
    assert_close(np.load(tmp_path / "y.npy"), model.predict(examples(model), verbose=0))


def test_planned_export_measures_layers_and_the_whole_model(tmp_path):
    model = network()
    plan = ks.export(model, tmp_path / "m", batch_size=[2, 3], verbose=False)
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))
    for layer in plan["layers"].values():
        assert set(layer["milliseconds"]) >= {"dense", "connection"}
        assert all(set(times) == {2, 3} and min(times.values()) > 0 for times in layer["milliseconds"].values())
    if any(layer["routine"] != "dense" for layer in plan["layers"].values()):
        assert set(plan["model"]) == {"dense", "op"}
    written = json.loads((tmp_path / "m" / "assets.extra" / "keras_sparse.json").read_text())
    assert written == json.loads(json.dumps(plan)) == ks.load(tmp_path / "m").plan


def test_a_routine_that_loses_at_one_batch_size_is_not_chosen(tmp_path, monkeypatch):
    def fake(functions, shapes, *args, **options):
        small = shapes[0][0] == 1
        slow = {"connection": 0.2, "thinned": 1.0 if small else 0.1}
        return {name: slow.get(name, 1.0 if small else 0.5) + (name == "compact") for name in functions}

    monkeypatch.setattr(timing, "alternate", fake)
    plan = ks.export(network("group"), tmp_path / "m", batch_size=(1, 8), verbose=False)
    assert {layer["routine"] for layer in plan["layers"].values()} == {"connection"}

    def losing(functions, shapes, *args, **options):
        small = shapes[0][0] == 1
        return {name: 1.0 if name == "dense" else (1.1 if small else 0.1) for name in functions}

    monkeypatch.setattr(timing, "alternate", losing)
    plan = ks.export(network("group"), tmp_path / "m", batch_size=(1, 8), verbose=False)
    assert {layer["routine"] for layer in plan["layers"].values()} == {"dense"}


def network_with_pools():
    """Poolings of all kinds: plain, overlapping, shared, nested, and some that are to be left alone."""
    pools = keras.layers.MaxPooling2D
    inputs = keras.Input((13, 12, 4))
    x = ks.layers.SparseConv2D(8, 3, name="conv")(inputs)
    x = pools(name="plain")(keras.layers.Activation("elu")(x))  # between them, so that it is no part of the convolution
    shared = pools((2, 3), strides=(1, 1), padding="same", name="shared")
    block = keras.Sequential([keras.Input((5, 5, 8)), pools(3, 2, padding="same", name="inner")], name="block")
    x = block(shared(shared(x)))
    x = pools(1, dtype="float64", name="double")(x)
    x = keras.layers.MaxPooling1D(1, name="flat")(keras.layers.Reshape((9, 8))(x))
    x = keras.layers.Reshape((1, 3, 3, 8))(x)
    x = keras.layers.TimeDistributed(pools(1), name="wrapper")(x)
    return prune(keras.Model(inputs, keras.layers.Flatten()(x)), 0.5)


def times_of_pools(monkeypatch, connection, per_image):
    """Make up times in ms at batch sizes 1 and 4, where the dense layer takes 1; return the shapes of poolings."""
    measured = []

    def fake(functions, shapes, *args, **options):
        (batch, *rest), *_ = shapes
        if "per_image" in functions:
            measured.append(tuple(rest))
            outputs = [function(tf.zeros((batch, *rest))).shape for function in functions.values()]
            assert outputs[0] == outputs[1]
        made_up = {"connection": connection, "per_image": per_image[batch > 1], "op": 0.5}
        return {name: made_up.get(name, 1.0) for name in functions}

    monkeypatch.setattr(timing, "alternate", fake)
    return measured


def test_max_pools_run_per_image_where_that_wins(tmp_path, monkeypatch, capsys):
    model = network_with_pools()
    measured = times_of_pools(monkeypatch, 0.5, (0.2, 1.0))
    plan = ks.export(model, tmp_path / "m", batch_size=(1, 4))
    pools = {"plain", "shared", "block/inner"}
    assert {path for path, layer in plan["layers"].items() if layer["routine"] == "per_image"} == pools
    expected = {"dense": {1: 1000.0, 4: 1000.0}, "per_image": {1: 200.0, 4: 1000.0}}
    assert plan["layers"]["plain"] == {"routine": "per_image", "bytes": 0, "milliseconds": expected}
    assert plan["layers"]["conv"]["routine"] == "connection" and set(plan["layers"]) == {"conv", *pools}
    assert set(measured) == {(11, 10, 8), (5, 5, 8)}
    assert "plain: per_image  (ms at batch [1, 4]: dense 1000.000/1000.000, per_image" in capsys.readouterr().out
    graph = (tmp_path / "m" / "saved_model.pb").read_bytes()
    assert b"MaxPoolV2" in graph
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))
    ks.export(model, tmp_path / "forced", routine="connection", verbose=False)  # unmeasured: convolutions alone
    assert b"MaxPoolV2" not in (tmp_path / "forced" / "saved_model.pb").read_bytes()


@pytest.mark.parametrize(
    ("backend", "connection", "per_image", "poolings"),
    [
        ("op", 0.5, (0.2, 1.01), {"dense"}),  # a loss at one batch size
        ("op", 0.5, (0.97, 0.97), {"dense"}),  # within the noise
        ("op", 1.0, (0.2, 0.2), set()),  # nothing sparse wins: the export is the dense one
        ("compact", 0.5, (0.2, 0.2), set()),
        ("dense", 0.5, (0.2, 0.2), set()),
    ],
)
def test_other_max_pools_are_left_to_tensorflow(tmp_path, monkeypatch, backend, connection, per_image, poolings):
    times_of_pools(monkeypatch, connection, per_image)
    plan = ks.export(network_with_pools(), tmp_path / "m", backend, batch_size=(1, 4), verbose=False)
    assert {layer["routine"] for path, layer in plan["layers"].items() if path != "conv"} == poolings
    assert b"MaxPoolV2" not in (tmp_path / "m" / "saved_model.pb").read_bytes()


def test_layers_in_wrappers_are_not_planned(tmp_path):
    """Nothing there can be exchanged, so a plan would name what does not run."""
    inputs = keras.Input((2, 7, 7, 8))
    inner = keras.layers.Conv2D(8, 3)
    model = keras.Model(inputs, keras.layers.TimeDistributed(inner)(inputs))
    inner.kernel.assign(inner.kernel * np.asarray(RandomMask(0.8)((1, 1, 8, 8))))
    assert ks.export(model, tmp_path / "m", routine="connection", verbose=False)["layers"] == {}
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))


def test_a_model_that_got_slower_is_exported_dense_with_a_warning(tmp_path, monkeypatch):
    def fake(functions, shapes, *args, **options):
        whole_model = "op" in functions
        return {name: 1.0 if (name == "dense") != whole_model else 0.5 for name in functions}

    monkeypatch.setattr(timing, "alternate", fake)
    model = network()
    with pytest.warns(UserWarning, match="slower than the dense one at batch size"):
        plan = ks.export(model, tmp_path / "m", verbose=False)
    assert {layer["routine"] for layer in plan["layers"].values()} == {"dense"}
    tf.saved_model.load(str(tmp_path / "m"))
    graph = (tmp_path / "m" / "saved_model.pb").read_bytes()
    assert b"ConnectionConv2D" not in graph and b"ThinnedConv2D" not in graph
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))


def network_with_empty_maps():
    """Group masks; the second convolution reads 5 of 16 maps of the first, and 17 filters of the third are zero."""
    inputs = keras.Input((9, 8, 3))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(16, 3, padding="same", name="first")(inputs))
    x = keras.layers.Conv2D(64, 3, padding="same", name="second")(keras.layers.ReLU()(x))
    x = keras.layers.Conv2D(64, 1, use_bias=False, name="third")(x)
    x = keras.layers.Conv2D(4, 1, name="last")(x)
    model = ks.sparsify(keras.Model(inputs, x), "group", exclude=["third", "last"])
    pattern = np.random.default_rng(2).random((3, 3, 16, 1)) < 0.4
    pattern[1, 1] = True
    pattern[:, :, 5:] = False
    model.get_layer("second").assign_mask(pattern)
    kernel = np.random.default_rng(3).standard_normal((1, 1, 64, 64))
    kernel[..., 7:24] = 0
    model.get_layer("third").kernel.assign(kernel)
    return model


REMOVED = {
    "first": {"inputs": [0, 3], "outputs": [11, 16]},
    "second": {"inputs": [11, 16], "outputs": [0, 64]},
    # One of the 17 stays: pixels of 48 channels fill cache lines.
    "third": {"inputs": [0, 64], "outputs": [16, 64]},
    "last": {"inputs": [16, 64], "outputs": [0, 4]},
}


@pytest.mark.parametrize(("backend", "routine"), [("op", "thinned"), ("compact", "compact"), ("dense", "auto")])
def test_channels_that_nothing_reads_are_not_exported(tmp_path, capsys, backend, routine):
    model = network_with_empty_maps()
    plan = ks.export(model, tmp_path / "m", backend, routine=routine)
    assert plan["removed"] == ks.load(tmp_path / "m").plan["removed"] == ({} if backend == "dense" else REMOVED)
    if backend != "dense":
        assert "first: 0 of 3 inputs and 11 of 16 outputs removed" in capsys.readouterr().out
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))
    constants = {"op": 9 * 64 * 5 * 0.4, "compact": 9 * 64 * 5, "dense": 9 * 64 * 16}[backend] + 64 * 64
    assert (tmp_path / "m" / "saved_model.pb").stat().st_size == pytest.approx(4 * constants, rel=0.15, abs=20_000)


def test_groups_run_thinned_where_that_wins(tmp_path, monkeypatch):
    def fake(functions, shapes, *args, **options):
        return {name: {"thinned": 0.1, "op": 0.1, "connection": 0.2}.get(name, 1.0) for name in functions}

    monkeypatch.setattr(timing, "alternate", fake)
    model = network_with_empty_maps()
    plan = ks.export(model, tmp_path / "m", verbose=False)
    assert plan["layers"]["second"]["routine"] == "thinned" and plan["removed"] == REMOVED
    assert b"ThinnedConv2D" in (tmp_path / "m" / "saved_model.pb").read_bytes()
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))


def test_channels_stay_where_removing_them_is_slower(tmp_path, monkeypatch):
    def fake(functions, shapes, *args, **options):
        return {name: 2.0 if name == "compact" else 1.0 for name in functions}

    monkeypatch.setattr(timing, "alternate", fake)
    with pytest.warns(UserWarning, match="slower than the dense one at batch size"):
        plan = ks.export(network_with_empty_maps(), tmp_path / "m", "compact", verbose=False)
    assert plan["removed"] == {} and set(plan["model"]) == {"dense", "compact"}


def test_a_plain_model_pruned_in_place_runs_sparse(tmp_path):
    model = keras.Sequential([keras.layers.Input((8, 8, 4)), keras.layers.Conv2D(16, 3), keras.layers.Conv2D(4, 3)])
    kernel, bias = model.layers[0].get_weights()
    model.layers[0].set_weights([kernel * np.asarray(RandomMask(0.9)((1, 1, 4, 16))), bias])
    plan = ks.export(model, tmp_path / "m", routine="connection", verbose=False)
    assert [layer["routine"] for layer in plan["layers"].values()] == ["connection"]  # the other one is dense
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(tmp_path, policy):
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, ks.layers.SparseConv2D(16, 3, dtype=policy)(inputs))
    prune(model, 0.5)
    ks.export(model, tmp_path / "m", routine="connection", verbose=False)
    got, expected = ks.load(tmp_path / "m")(examples(model)), model.predict(examples(model), verbose=0)
    np.testing.assert_allclose(np.asarray(got, "float32"), np.asarray(expected, "float32"), atol=0.03, rtol=0.03)


def test_channels_first_runs_on_the_cpu_and_equals_channels_last(tmp_path):
    def build(data_format, shape):
        inputs = keras.Input(shape)
        layer = ks.layers.SparseConv2D(6, 3, data_format=data_format, bias_initializer="ones")
        return keras.Model(inputs, layer(inputs)), layer

    first, layer = build("channels_first", (4, 8, 7))
    last, twin = build("channels_last", (8, 7, 4))
    twin.set_weights(layer.get_weights())
    mask = np.asarray(RandomMask(0.5)(layer.mask.shape))
    layer.assign_mask(mask)
    twin.assign_mask(mask)
    ks.export(first, tmp_path / "m", routine="connection", verbose=False)
    images = examples(last)
    got = ks.load(tmp_path / "m")(images.transpose(0, 3, 1, 2)).numpy()
    assert_close(got.transpose(0, 2, 3, 1), last.predict(images, verbose=0))


def test_several_inputs_and_outputs(tmp_path):
    a, b = keras.Input((6, 6, 2), name="a"), keras.Input((5,), name="b")
    features = keras.layers.Flatten()(ks.layers.SparseConv2D(4, 3)(a))
    left, right = ks.layers.SparseDense(3)(features), ks.layers.SparseDense(2)(b)
    generator = np.random.default_rng(2)
    values = {"a": generator.random((2, 6, 6, 2), "float32"), "b": generator.random((2, 5), "float32")}
    listed = prune(keras.Model([a, b], [left, right]), 0.5)
    ks.export(listed, tmp_path / "list", routine="connection", verbose=False)
    for got, expected in zip(
        ks.load(tmp_path / "list")([values["a"], values["b"]]), listed.predict(list(values.values()), verbose=0)
    ):
        assert_close(got.numpy(), expected)
    named = prune(keras.Model({"a": a, "b": b}, {"left": left, "right": right}), 0.5)
    ks.export(named, tmp_path / "dict", routine="connection", verbose=False)
    expected = named.predict(values, verbose=0)
    serve = tf.saved_model.load(str(tmp_path / "dict")).signatures["serving_default"]
    for outputs in (ks.load(tmp_path / "dict")(values), serve(**{k: tf.constant(v) for k, v in values.items()})):
        assert set(outputs) == {"left", "right"}
        for name in outputs:
            assert_close(outputs[name].numpy(), expected[name])
    with pytest.raises(ValueError, match="`inputs` must hold 2 tensors"):
        ks.load(tmp_path / "list")(values["a"])


def test_unknown_spatial_sizes(tmp_path):
    inputs = keras.Input((None, None, 3))
    model = prune(keras.Model(inputs, ks.layers.SparseConv2D(8, 3)(inputs)), 0.9)
    with pytest.raises(ValueError, match="`input_shape` must be given"):
        ks.export(model, tmp_path / "m", verbose=False)
    ks.export(model, tmp_path / "m", input_shape=(12, 12, 3), verbose=False)
    for size in (5, 9):
        images = np.random.default_rng(0).random((2, size, size + 1, 3), "float32")
        assert_close(ks.load(tmp_path / "m")(images).numpy(), model.predict(images, verbose=0))


def test_large_models_keep_their_variables(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_MAX_FROZEN_BYTES", 10)
    model = network()
    ks.export(model, tmp_path / "m", routine="connection", verbose=False)
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))
    assert (tmp_path / "m" / "variables" / "variables.data-00000-of-00001").stat().st_size > 10


def test_files_shrink_with_the_sparsity(tmp_path):
    inputs = keras.Input((8, 8, 64))
    model = prune(keras.Model(inputs, ks.layers.SparseConv2D(128, 3)(inputs)), 0.95)
    ks.export(model, tmp_path / "op", routine="connection", verbose=False)
    ks.export(model, tmp_path / "dense", "dense", verbose=False)
    sizes = {name: (tmp_path / name / "saved_model.pb").stat().st_size for name in ("op", "dense")}
    assert sizes["dense"] > 4 * 64 * 128 * 9
    assert sizes["op"] < 0.15 * sizes["dense"]


def test_an_existing_export_is_replaced_whole_and_survives_a_failure(tmp_path, monkeypatch):
    model = network()
    ks.export(model, tmp_path / "m", "dense", verbose=False)
    (tmp_path / "m" / "leftover").write_text("old")
    before = sorted(p.name for p in (tmp_path / "m").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(export_module.json, "dump", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            ks.export(model, tmp_path / "m", "dense", verbose=False)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == before
    assert os.listdir(tmp_path) == ["m"]
    ks.export(model, tmp_path / "m", "dense", verbose=False)
    assert not (tmp_path / "m" / "leftover").exists() and os.listdir(tmp_path) == ["m"]


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(FileExistsError, match="`path` must be a directory"):
        ks.export(network(), tmp_path / "m", "dense", verbose=False)
    assert (tmp_path / "m").read_text() == "mine"


def test_without_the_compiled_ops(tmp_path, monkeypatch):
    model = network()
    ks.export(model, tmp_path / "op", routine="connection", verbose=False)
    monkeypatch.setattr(ks.ops, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="`backend` must be 'compact' or 'dense'"):
        ks.export(model, tmp_path / "new", verbose=False)
    with pytest.raises(RuntimeError, match="`path` must hold a 'dense' or 'compact' export"):
        ks.load(tmp_path / "op")
    ks.export(model, tmp_path / "dense", "dense", verbose=False)


def test_the_model_is_left_as_it_was(tmp_path):
    model = network()
    before = model.get_weights()
    assert export_function is ks.export
    ks.export(model, tmp_path / "m", routine="connection", verbose=False)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert model.layers[1].__class__ is ks.layers.SparseConv2D


def test_training_is_no_concern_of_an_export(tmp_path):
    class OwnStep(keras.Model):
        def __init__(self, x, y, scale):  # not one that Keras could call with inputs and outputs alone
            super().__init__(x, y)
            self.scale = scale

        def train_step(self, data):
            raise AssertionError("never trained")

    inputs = keras.Input((6, 6, 2))
    model = prune(OwnStep(inputs, ks.layers.SparseConv2D(3, 3)(inputs), 2), 0.5)
    model.compile("adam", lambda y, p: y - p)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ks.export(model, tmp_path / "m", routine="connection", verbose=False)
    assert_close(ks.load(tmp_path / "m")(examples(model)).numpy(), model.predict(examples(model), verbose=0))
