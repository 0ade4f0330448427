"""sparsify: a new model with sparse layers, the same outputs, and everything else as it was."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse import selection
from keras_sparse.layers import BaseSparse, SparseConv2D, SparseDense

TWINS = {layers.Conv2D: SparseConv2D, layers.Dense: SparseDense}
# How many layers of each model are exchanged, counting shared ones once.
COUNTS = {
    "sequential": 3,
    "sequential_called": 2,
    "sequential_built": 1,
    "residual": 4,
    "nested": 4,
    "shared_layer": 1,
    "shared_with_nested": 2,
    "nested_twice": 1,
    "many_inputs": 4,
    "dict_inputs": 4,
    "text": 1,
    "wrapped": 1,
    "low_precision": 3,
}


def flat(model):
    """Return the layers by path; composite layers number the names of their own parts anew in each copy."""
    layers = selection.flatten_layers(model)
    return {re.sub(r"(/\w+?)_\d+$", r"\1", path): layer for path, layer in layers.items()}


def sparse_layers(model):
    return {path: layer for path, layer in flat(model).items() if isinstance(layer, BaseSparse)}


def test_every_model_has_a_count(models):
    assert set(COUNTS) == set(models)


def test_any_model(model, inputs_of, assert_same_outputs, request):
    x = inputs_of(model)
    before = [w.copy() for w in model.get_weights()]
    types = {path: type(layer) for path, layer in flat(model).items()}
    sparse = ks.sparsify(model, "connection")
    assert_same_outputs(sparse, model, x)

    found = flat(sparse)
    assert len(sparse_layers(sparse)) == COUNTS[request.node.callspec.id]
    assert list(found) == list(types), "names and paths are kept, shared layers stay one"
    for path, layer in flat(model).items():
        copy = found[path]
        inner = path.startswith("steps/")
        assert type(layer) is types[path]
        assert type(copy) is (type(layer) if inner else TWINS.get(type(layer), type(layer)))
        assert copy is not layer
        assert copy.dtype_policy == layer.dtype_policy and copy.trainable == layer.trainable
    for layer in sparse_layers(sparse).values():
        assert np.all(np.asarray(layer.mask) == 1) and layer.granularity.name == "connection"

    # The original shares no variable with the result.
    own = {id(v) for v in model.variables}
    assert not own & {id(v) for v in sparse.variables}
    for layer in sparse_layers(sparse).values():
        layer.assign_mask(np.zeros(layer.mask.shape))
    for variable in sparse.weights:
        variable.assign(keras.ops.zeros_like(variable))
    assert len(before) == len(model.get_weights())
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_the_graph_stays_what_it_was(model):
    sparse = ks.sparsify(model)
    assert type(sparse) is type(model)
    assert sparse.name == model.name
    if not isinstance(model, keras.Sequential):
        assert sparse.output_names == model.output_names
    assert [layer.name for layer in sparse.layers] == [layer.name for layer in model.layers]
    assert sparse.count_params() == model.count_params() + sum(
        np.asarray(layer.mask).size for layer in sparse_layers(sparse).values()
    )
    for ours, theirs in ((sparse.inputs, model.inputs), (sparse.outputs, model.outputs)):
        assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs]


def test_the_result_trains_saves_and_loads(models, inputs_of, prune, assert_same_outputs, tmp_path):
    for name in ("residual", "nested", "nested_twice"):
        sparse = prune(ks.sparsify(models[name]()))
        x = inputs_of(sparse)
        sparse.compile(keras.optimizers.AdamW(0.01), "mse")
        sparse.train_on_batch(x, keras.ops.ones_like(sparse(x)))
        for layer in sparse_layers(sparse).values():
            pruned = np.broadcast_to(np.asarray(layer.mask), layer._kernel.shape) == 0
            assert pruned.any() and not np.asarray(layer._kernel)[pruned].any()
        sparse.save(tmp_path / "m.keras")
        again = keras.models.load_model(tmp_path / "m.keras", safe_mode=False)
        assert_same_outputs(again, sparse, x)


@pytest.mark.parametrize("granularity", [*ks.granularity.names(), ks.granularity.Granularity("taps", 1, 0, 0)], ids=str)
def test_granularity(models, granularity, inputs_of, assert_same_outputs):
    model = models["sequential"]()
    sparse = ks.sparsify(model, granularity)
    assert_same_outputs(sparse, model, inputs_of(model))
    expected = ks.granularity.get(granularity)
    for layer in sparse_layers(sparse).values():
        assert layer.granularity == expected
        assert layer.mask.shape == expected.mask_shape(layer._kernel.shape)


def test_default_granularity_is_connection(models):
    for layer in sparse_layers(ks.sparsify(models["sequential"]())).values():
        assert layer.granularity.name == "connection"


def test_sparsifying_a_sparse_model_keeps_masks_and_adds_layers(models, prune, inputs_of, assert_same_outputs):
    model = prune(ks.sparsify(models["sequential"](), "weight", include="conv1"))
    sparse = ks.sparsify(model, "group")
    assert [layer.granularity.name for layer in sparse_layers(sparse).values()] == ["weight", "group", "group"]
    np.testing.assert_array_equal(sparse.get_layer("conv1").mask, model.get_layer("conv1").mask)
    assert_same_outputs(sparse, model, inputs_of(model))


# Choosing layers

CHOICES = [
    ("sequential", {"include": "conv1"}, ["conv1"]),
    ("sequential", {"include": "conv."}, ["conv1", "conv2"]),
    ("sequential", {"include": re.compile("conv.|logits")}, ["conv1", "conv2", "logits"]),
    ("sequential", {"include": layers.Conv2D}, ["conv1", "conv2"]),
    ("sequential", {"include": layers.Dense}, ["logits"]),
    ("sequential", {"include": ["logits", layers.Conv2D], "exclude": "conv1"}, ["conv2", "logits"]),
    ("sequential", {"exclude": "logits"}, ["conv1", "conv2"]),
    ("sequential", {"exclude": [layers.Dense, "conv2"]}, ["conv1"]),
    ("sequential", {"exclude": layers.BatchNormalization}, ["conv1", "conv2", "logits"]),
    ("nested", {"include": "conv"}, ["branch/leaf/conv", "branch/conv"]),
    ("nested", {"include": "branch/conv"}, ["branch/conv"]),
    ("nested", {"include": "branch/leaf/conv"}, ["branch/leaf/conv"]),
    ("nested", {"include": "branch/.*"}, ["branch/leaf/conv", "branch/conv"]),
    ("nested", {"exclude": ["branch/leaf/.*", "logits"]}, ["stem", "branch/conv"]),
    ("shared_with_nested", {"include": ".*shared"}, ["shared"]),
]


@pytest.mark.parametrize(("name", "choice", "expected"), CHOICES, ids=lambda v: str(v) if isinstance(v, dict) else None)
def test_choice(name, choice, expected, models, inputs_of, assert_same_outputs):
    model = models[name]()
    sparse = ks.sparsify(model, **choice)
    found = {path if name == "nested" else path.split("/")[-1] for path in sparse_layers(sparse)}
    assert found == set(expected)
    assert_same_outputs(sparse, model, inputs_of(model))


def test_a_name_with_special_characters_names_its_layer():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="a+b"), layers.Dense(3, name="aab")])
    assert "a+b" in sparse_layers(ks.sparsify(model, include="a+b"))  # and "aab", as an expression
    assert list(sparse_layers(ks.sparsify(model, exclude=re.escape("a+b")))) == ["aab"]


@pytest.mark.parametrize(
    ("name", "choice", "error", "message"),
    [
        ("sequential", {"include": "bn"}, ValueError, r"'bn' \(BatchNormalization\) cannot"),
        ("sequential", {"include": "depthwise"}, ValueError, r"'depthwise' \(DepthwiseConv2D\) cannot"),
        ("sequential", {"include": layers.LSTM}, ValueError, "`include` must match a layer"),
        ("sequential", {"include": []}, ValueError, "hold a Conv2D or Dense layer"),
        ("sequential", {"include": "conv1", "exclude": "conv1"}, ValueError, "hold a Conv2D or Dense layer"),
        ("sequential", {"exclude": "conv"}, ValueError, "`exclude` must match a layer"),
        ("sequential", {"include": "conv["}, ValueError, "regular expressions"),
        ("sequential", {"include": 3}, TypeError, "`include` must be a layer name"),
        ("sequential", {"include": int}, TypeError, "layer classes"),
        ("sequential", {"exclude": [None]}, TypeError, "`exclude` must hold"),
        ("wrapped", {"include": "inner"}, ValueError, r"'steps/inner' \(Dense\) cannot"),
        ("wrapped", {"include": "steps/inner"}, ValueError, r"'steps/inner' \(Dense\) cannot"),
        ("sequential", {"granularity": "tap"}, ValueError, "`granularity` must be one of"),
    ],
    ids=str,
)
def test_wrong_choice(name, choice, error, message, models):
    with pytest.raises(error, match=message):
        ks.sparsify(models[name](), **choice)


def test_inner_layers_of_wrappers_are_left_alone(models, inputs_of, assert_same_outputs):
    model = models["wrapped"]()
    sparse = ks.sparsify(model)
    assert type(sparse.get_layer("steps").layer) is layers.Dense
    assert type(sparse.get_layer("conv")) is SparseConv2D
    assert_same_outputs(sparse, model, inputs_of(model))


class Doubled(layers.Conv2D):
    def call(self, inputs):
        return 2 * super().call(inputs)


def test_subclasses_of_conv2d_are_left_alone(inputs_of, assert_same_outputs):
    model = keras.Sequential([keras.Input((6, 6, 3)), Doubled(2, 3, name="own"), layers.Conv2D(2, 3, name="plain")])
    sparse = ks.sparsify(model)
    assert [type(layer) for layer in sparse.layers] == [Doubled, SparseConv2D]
    assert_same_outputs(sparse, model, inputs_of(model))
    with pytest.raises(ValueError, match=r"'own' \(Doubled\) cannot"):
        ks.sparsify(model, include="own")


# State


def test_batch_normalization_statistics_are_copied(models):
    model = models["sequential"]()
    copy = ks.sparsify(model).get_layer("bn")
    for name in ("moving_mean", "moving_variance", "gamma", "beta"):
        value = np.asarray(getattr(model.get_layer("bn"), name))
        assert np.ptp(value) > 0
        np.testing.assert_array_equal(getattr(copy, name), value)


def test_adapted_layers_are_copied(models):
    model = models["text"]()
    sparse = ks.sparsify(model)
    assert sparse.get_layer("lookup").get_vocabulary() == model.get_layer("lookup").get_vocabulary()
    assert len(model.get_layer("lookup").get_vocabulary()) == 4
    np.testing.assert_array_equal(sparse.get_layer("scale").mean, model.get_layer("scale").mean)
    assert np.abs(np.asarray(sparse.get_layer("scale").mean)).min() > 1


def test_trainable_flags(models):
    model = models["nested"]()
    model.get_layer("branch").get_layer("leaf").trainable = False
    model.get_layer("logits").trainable = False
    sparse = ks.sparsify(model)
    flags = {path: layer.trainable for path, layer in flat(model).items()}
    assert {path: layer.trainable for path, layer in flat(sparse).items()} == flags
    assert set(flags.values()) == {True, False}
    assert sparse.get_layer("branch").get_layer("leaf").trainable is False
    assert len(sparse.trainable_variables) == len(model.trainable_variables)


def test_flags_of_models_and_of_layers_in_them_are_kept_apart(models):
    model = models["nested"]()
    model.get_layer("branch").trainable = False
    model.get_layer("branch").get_layer("conv").trainable = True
    sparse = ks.sparsify(model)
    branch = sparse.get_layer("branch")
    assert not branch.trainable and branch.get_layer("conv").trainable and not branch.get_layer("leaf").trainable
    assert len(sparse.trainable_variables) == len(model.trainable_variables)
    model.trainable = False
    assert ks.sparsify(model).trainable is False


def test_layer_arguments_are_kept():
    options = {
        "kernel_regularizer": keras.regularizers.L2(0.1),
        "kernel_constraint": keras.constraints.MaxNorm(2.0),
        "activation": "gelu",
        "kernel_initializer": keras.initializers.HeNormal(seed=3),
    }
    model = keras.Sequential(
        [
            keras.Input((3, 8, 8)),
            layers.Conv2D(4, 3, data_format="channels_first", dilation_rate=2, **options),
            layers.Dense(2, use_bias=False, **options),
        ]
    )
    for ours, theirs in zip(ks.sparsify(model).layers, model.layers):
        config = ours.get_config()
        del config["granularity"], config["mask_initializer"]
        assert config == theirs.get_config()
        np.testing.assert_array_equal(ours.kernel, theirs.kernel)


def test_a_lora_update_is_kept(inputs_of, assert_same_outputs):
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3, lora_rank=2, name="dense")])
    model.get_layer("dense").lora_kernel_b.assign(np.ones((2, 3)))
    assert_same_outputs(ks.sparsify(model), model, inputs_of(model), rtol=1e-6, atol=1e-6)


def unregistered_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


@pytest.mark.parametrize(
    "loss",
    ["mse", keras.losses.Huber(delta=0.7), unregistered_loss, lambda t, p: keras.ops.mean((t - p) ** 4, axis=-1)],
    ids=["name", "object", "function", "lambda"],
)
def test_compile_state(loss, models, inputs_of):
    model = models["sequential"]()
    optimizer = keras.optimizers.AdamW(keras.optimizers.schedules.ExponentialDecay(0.01, 5, 0.5), clipnorm=0.3)
    metrics = [keras.metrics.CategoricalAccuracy(name="accuracy"), unregistered_loss]
    model.compile(optimizer, loss, metrics=metrics, run_eagerly=True)
    x, y = inputs_of(model), np.eye(3, dtype="float32")
    model.train_on_batch(x, y)
    sparse = ks.sparsify(model)
    assert sparse.compiled and sparse.loss is loss and sparse.run_eagerly
    assert sparse.optimizer is not optimizer and sparse.optimizer.get_config() == optimizer.get_config()
    assert int(sparse.optimizer.iterations) == 0 < int(optimizer.iterations)
    found, expected = (m.evaluate(x, y, verbose=0, return_dict=True) for m in (sparse, model))
    assert found == expected and {"loss", "accuracy", "unregistered_loss"} <= set(found)

    state = [keras.ops.convert_to_numpy(v).copy() for v in (*model.variables, *optimizer.variables)]
    sparse.train_on_batch(x, y)
    assert model.compiled and model.optimizer is optimizer
    for before, after in zip(state, (*model.variables, *optimizer.variables), strict=True):
        np.testing.assert_array_equal(before, after)


def test_ways_to_run_are_kept(models):
    model = models["sequential"]()
    model.compile("sgd", "mse", steps_per_execution=3, jit_compile=True)
    model.optimizer.learning_rate = 0.125
    sparse = ks.sparsify(model)
    assert (sparse.steps_per_execution, sparse.jit_compile, sparse.run_eagerly) == (3, True, False)
    assert float(sparse.optimizer.learning_rate) == 0.125


def test_compiled_outputs_by_name(models, inputs_of):
    model = models["dict_inputs"]()
    model.compile("sgd", {"a": "mse", "b": "mae"}, metrics={"a": ["mae"]}, loss_weights={"a": 1.0, "b": 0.5})
    x = inputs_of(model)
    y = {"a": np.ones((3, 3)), "b": np.ones((3, 2))}
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    found = ks.sparsify(model).evaluate(x, y, verbose=0, return_dict=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_loss_scaling_is_kept(models):
    for scale in (True, False):
        keras.config.set_dtype_policy("mixed_float16")
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        model.compile(keras.optimizers.Adam(0.3), "mse", auto_scale_loss=scale)
        optimizer = ks.sparsify(model).optimizer
        assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer) is scale
        np.testing.assert_allclose(optimizer.learning_rate, 0.3)


def test_inputs_keep_what_they_are(inputs_of):
    plain, thin = keras.Input((4,)), keras.Input((4,), sparse=True, name="thin")
    extra = keras.Input((2,), optional=True, dtype="int32")

    class Left(layers.Layer):
        def call(self, a, b=None):
            return a

    dense = layers.Dense(3)
    model = keras.Model({"a": plain, "b": thin, "c": extra}, layers.Add()([dense(Left()(plain, extra)), dense(thin)]))
    sparse = ks.sparsify(model)
    for ours, theirs in zip(sparse.inputs, model.inputs, strict=True):
        assert (ours.shape, ours.dtype, ours.sparse) == (theirs.shape, theirs.dtype, theirs.sparse)
    x = {"a": np.ones((2, 4), "float32"), "b": np.ones((2, 4), "float32"), "c": None}
    if "optional" not in model.get_layer("thin").get_config():
        x["c"] = np.ones((2, 2), "int32")  # this Keras forgets which inputs are optional
    np.testing.assert_array_equal(sparse(x), model(x))


def test_uncompiled_stays_uncompiled_and_nested_compilation_is_kept(models):
    assert not ks.sparsify(models["sequential"]()).compiled
    model = models["nested"]()
    model.get_layer("branch").compile("sgd", unregistered_loss)
    sparse = ks.sparsify(model)
    assert not sparse.compiled and sparse.get_layer("branch").compiled
    assert not model.compiled and model.get_layer("branch").compiled


# What is refused


class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def test_a_subclassed_model_is_refused_with_advice():
    model = Subclassed(name="own")
    model.build((None, 4))
    for function in (ks.sparsify, ks.strip):
        with pytest.raises(ValueError) as caught:
            function(model)
        message = str(caught.value)
        assert all(word in message for word in ("subclassed", "SparseConv2D", "GradualPruning", "'own'", "Subclassed"))


def test_a_subclassed_part_is_copied_as_it_is(inputs_of, assert_same_outputs):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2, name="last")(Subclassed(name="part")(inputs)))
    sparse = ks.sparsify(model)
    assert_same_outputs(sparse, model, inputs_of(model))
    assert list(sparse_layers(sparse)) == ["last"]
    with pytest.raises(ValueError, match="cannot"):
        ks.sparsify(model, include="part/.*")


@pytest.mark.parametrize("function", [ks.sparsify, ks.strip])
def test_an_unbuilt_model_is_refused_with_advice(function):
    with pytest.raises(ValueError, match=r"must be built .*`Input`"):
        function(keras.Sequential([layers.Dense(3)], name="unbuilt"))


@pytest.mark.parametrize("thing", [None, "model", layers.Dense(3)], ids=["none", "text", "layer"])
def test_no_model(thing):
    for function in (ks.sparsify, ks.strip):
        with pytest.raises(TypeError, match="`model` must be a Keras model"):
            function(thing)


class Steps(keras.Sequential):
    def train_step(self, data):
        return {"own": 1.0}


class Halved(keras.Sequential):
    def call(self, inputs, **options):
        return super().call(inputs, **options) / 2


class Kept(keras.Model):
    def train_step(self, data):
        return {"own": 1.0}


class Built(keras.Model):
    def __init__(self, units):
        inputs = keras.Input((4,))
        super().__init__(inputs, layers.Dense(units)(inputs))


def test_classes_of_models(inputs_of, assert_same_outputs):
    inputs = keras.Input((4,))
    kept = Kept(inputs, layers.Dense(3)(inputs))
    assert type(ks.sparsify(kept)) is Kept
    for model in (Steps([keras.Input((4,)), layers.Dense(3)]), Built(3)):
        with pytest.warns(UserWarning, match="such as `train_step`, are lost"):
            sparse = ks.sparsify(model)
        assert_same_outputs(sparse, model, inputs_of(model))
    halved = Halved([keras.Input((4,)), layers.Dense(3)], name="halved")
    for model in (halved, keras.Sequential([keras.Input((4,)), halved])):
        with pytest.raises(ValueError, match="overrides `call`.*'halved' of class Halved"):
            ks.sparsify(model)


def test_quantized_layers_are_left_alone():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="one"), layers.Dense(2, name="two")])
    model.get_layer("one").quantize("int8")
    sparse = ks.sparsify(model)
    assert [type(layer) for layer in sparse.layers] == [layers.Dense, SparseDense]
    x = np.ones((2, 4), "float32")
    np.testing.assert_array_equal(sparse(x), model(x))
