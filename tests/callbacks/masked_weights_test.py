"""The mask interface: whatever holds the mask, no pruned weight is ever anything but zero."""

import re

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.callbacks import GradualPruning
from keras_sparse.callbacks.masked_weights import InPlaceMask, LayerMask, masked_weights
from keras_sparse.schedules import Doubling, OneShot, PolynomialDecay

layers = keras.layers

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=3),
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
}


def to_numpy(variable):
    return keras.ops.convert_to_numpy(variable)


def stored(model):
    """What the kernels' variables hold, not what a sparse layer makes of it."""
    return {layer.name: to_numpy(layer._kernel) for layer in model.layers if hasattr(layer, "_kernel")}


def own_masks(model):
    return {layer.name: to_numpy(layer.mask) for layer in model.layers if hasattr(layer, "mask")}


def names(model, **options):
    return [weight.name for weight in masked_weights(model, **options)]


def sequential(shape, *parts):
    return keras.Sequential([keras.Input(shape), *parts], name="model")


def assert_zero_where_pruned(kernels, masks, what=""):
    """And nowhere else: a kept weight that is zero by chance is not expected either."""
    for name, kernel in kernels.items():
        kept = np.broadcast_to(masks[name] == 1, kernel.shape)
        np.testing.assert_array_equal(kernel != 0, kept, err_msg=f"{what} {name}")


# No file holds a pruned weight (invariant 1).


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_file_is_sparse(mlp, fit, recorder, kind, optimizer, tmp_path):
    """A file a batch, written before the pruning in the list of callbacks and after it.

    Pruned in a file is what the callback held when it was written: at an update step, the masks of before the update
    in a file that was written before the callback's turn, the new ones in one written after it.
    """
    pruning, model = GradualPruning(PolynomialDecay(0.0, 0.75, 2, 18, frequency=4)), mlp(kind)
    writers, records = [], {}
    for order in ("before", "after"):
        path = str(tmp_path / f"{order}-{{epoch}}-{{batch}}.weights.h5")
        writers.append(keras.callbacks.ModelCheckpoint(path, save_freq=1, save_weights_only=True))
        records[order] = recorder(pruning)
    fit(
        model,
        writers[0],
        records["before"],
        pruning,
        writers[1],
        records["after"],
        optimizer=OPTIMIZERS[optimizer](),
    )

    loaded = mlp(kind)
    for order, record in records.items():
        assert record.steps == list(range(1, 21))
        for step, masks in zip(record.steps, record.masks):
            loaded.load_weights(tmp_path / f"{order}-{1 + (step - 1) // 10}-{1 + (step - 1) % 10}.weights.h5")
            assert_zero_where_pruned(stored(loaded), masks, f"{order} {step}")
            for name, mask in own_masks(loaded).items():
                np.testing.assert_array_equal(mask, masks[name], err_msg=f"{order} {step} {name}")
    for step, before, after in zip(record.steps, records["before"].masks, records["after"].masks):
        assert (before["a"] != after["a"]).any() == (step in (6, 10, 14, 18)), step


def test_every_whole_model_file_is_sparse(mlp, fit, recorder, kind, tmp_path):
    """`.keras` files too; and what was saved at an update step before it took place, is updated when it is resumed."""
    pruning, model = GradualPruning(PolynomialDecay(0.25, 0.75, 4, 12, frequency=4)), mlp(kind)
    files = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}-{batch}.keras"), save_freq=4)
    before = recorder(pruning)
    fit(model, files, before, pruning, optimizer=OPTIMIZERS["adam"]())
    for step, path in ((4, "1-4"), (8, "1-8"), (12, "2-2"), (16, "2-6"), (20, "2-10")):
        loaded = keras.models.load_model(tmp_path / f"{path}.keras")
        assert_zero_where_pruned(stored(loaded), before.masks[step - 1], str(step))
        assert int(loaded.optimizer.iterations) == step
    resumed = keras.models.load_model(tmp_path / "2-2.keras")
    goes_on = GradualPruning(PolynomialDecay(0.25, 0.75, 4, 12, frequency=4))
    fit(resumed, goes_on, epochs=1)
    assert [entry["step"] for entry in goes_on.history] == [12] and goes_on.history[0]["sparsity"] == 0.75


def test_averages_are_sparse(mlp, fit, recorder, kind, tmp_path):
    """The averages that take the weights' place at the end, or in every epoch's file, know the masks."""
    pruning, model = GradualPruning(PolynomialDecay(0.0, 0.75, 2, 18, frequency=4)), mlp(kind)
    path = str(tmp_path / "{epoch}.weights.h5")
    files = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    swap, record = keras.callbacks.SwapEMAWeights(swap_on_epoch=True), recorder(pruning)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.9)
    fit(model, swap, files, pruning, record, optimizer=optimizer)
    loaded = mlp(kind)
    for epoch in (1, 2):
        loaded.load_weights(tmp_path / f"{epoch}.weights.h5")
        masks = record.masks[10 * epoch - 1]
        assert_zero_where_pruned(stored(loaded), masks, str(epoch))
        differs = stored(loaded)["a"] != record.kernels[10 * epoch - 1]["a"]
        assert differs.any()  # averages, not the weights
    assert_zero_where_pruned(stored(model), record.masks[-1])


def test_averages_of_a_frozen_layer(mlp, fit, kind):
    """It is none of the optimizer's business, and pruned all the same."""
    model = mlp(kind)
    model.get_layer("a").trainable = False
    fit(model, GradualPruning(OneShot(0.75, 3)), optimizer=OPTIMIZERS["adam"](), epochs=1)
    assert {name: np.count_nonzero(kernel) for name, kernel in stored(model).items()} == {"a": 12, "b": 6}


def test_in_compiled_steps(mlp, fit, recorder, kind):
    """XLA compiles the masking with the step; many steps run between two turns of the callback."""
    pruning, model = GradualPruning(PolynomialDecay(0.0, 0.75, 2, 18, frequency=4)), mlp(kind)
    record = recorder(pruning)
    fit(model, record, pruning, optimizer=OPTIMIZERS["sgd"](), jit_compile=True, steps_per_execution=5)
    for kernels, masks in zip(record.kernels, record.masks):
        assert_zero_where_pruned(kernels, masks)
    assert np.count_nonzero(stored(model)["a"]) == 12


# Constraints.


@pytest.mark.parametrize("constraint", [keras.constraints.NonNeg(), keras.constraints.MaxNorm(0.5)])
def test_the_users_constraint_holds_too(mlp, fit, recorder, kind, constraint):
    pruning, model = GradualPruning(OneShot(0.5, 3), include="a"), mlp(kind, kernel_constraint=constraint)
    record, held = recorder(pruning), model.get_layer("a")._kernel.constraint
    fit(model, pruning, record, optimizer=OPTIMIZERS["sgd"]())
    for step, kernels, masks in zip(record.steps, record.kernels, record.masks):
        kernel = kernels["a"]
        assert (kernel[masks["a"] == 0] == 0).all() and (masks["a"] == 0).sum() == (24 if step >= 3 else 0)
        if isinstance(constraint, keras.constraints.NonNeg):
            assert (kernel >= 0).all()
        else:
            assert (np.linalg.norm(kernel, axis=0) <= 0.5 + 1e-6).all()
    assert model.get_layer("a")._kernel.constraint == held


def test_a_constraint_that_moves_zeros(kind):
    """Pruned weights are zero even where the user's constraint would not leave them so."""

    class Shift(keras.constraints.Constraint):
        def __call__(self, w):
            return w + 1.0

    dense = layers.Dense if kind == "plain" else ks.layers.SparseDense
    model = sequential((6,), dense(8, name="a", kernel_constraint=Shift()))
    pruning, optimizer = GradualPruning(OneShot(0.5)), keras.optimizers.SGD(0.1)
    pruning.start(model)
    optimizer.apply([np.ones(v.shape, "float32") for v in model.trainable_variables], model.trainable_variables)
    assert np.count_nonzero(stored(model)["a"]) == 24


# Plain layers.


def attention(layer):
    x = keras.Input((5, 8))
    return keras.Model(x, layer(x, x))


RNN = ["kernel", "recurrent_kernel"]
ATTENTION = ["query", "key", "value", "attention_output"]

# Input shape, layer, names of what is pruned of it below the layer's own name.
PLAIN = [
    ((9, 4), lambda: layers.Conv1D(6, 3), [""]),
    ((9, 9, 4), lambda: layers.Conv2D(6, 3, groups=2), [""]),
    ((5, 5, 5, 2), lambda: layers.Conv3D(4, 2), [""]),
    ((9, 4), lambda: layers.Conv1DTranspose(6, 3), [""]),
    ((9, 9, 4), lambda: layers.Conv2DTranspose(6, 3), [""]),
    ((5, 5, 5, 2), lambda: layers.Conv3DTranspose(4, 2), [""]),
    ((9, 4), lambda: layers.SeparableConv1D(6, 3), ["/pointwise_kernel"]),
    ((9, 9, 4), lambda: layers.SeparableConv2D(6, 3, depth_multiplier=2), ["/pointwise_kernel"]),
    ((7,), lambda: layers.Dense(6), [""]),
    ((9, 4), lambda: layers.EinsumDense("abc,cde->abde", output_shape=(None, 3, 5)), [""]),
    ((9,), lambda: layers.Embedding(11, 5), [""]),
    ((9, 4), lambda: layers.TimeDistributed(layers.Dense(6, name="inner")), ["/inner"]),
    ((9, 4), lambda: layers.SimpleRNN(3), [f"/simple_rnn_cell/{key}" for key in RNN]),
    ((9, 4), lambda: layers.GRU(3), [f"/gru_cell/{key}" for key in RNN]),
    ((9, 4), lambda: layers.LSTM(3), [f"/lstm_cell/{key}" for key in RNN]),
    ((9, 4), lambda: layers.RNN(layers.GRUCell(3, name="cell")), [f"/cell/{key}" for key in RNN]),
    (
        (9, 4),
        lambda: layers.RNN(
            layers.StackedRNNCells([layers.GRUCell(3, name="low"), layers.LSTMCell(2, name="high")], name="stack")
        ),
        [f"/stack/{cell}/{key}" for cell in ("low", "high") for key in RNN],
    ),
    ((9, 7, 4), lambda: layers.ConvLSTM1D(3, 2), [f"/conv_lstm_cell/{key}" for key in RNN]),
    (
        (9, 4),
        lambda: layers.Bidirectional(layers.LSTM(3, name="lstm"), name="both"),
        [f"/{way}_lstm/lstm_cell/{key}" for way in ("forward", "backward") for key in RNN],
    ),
    (None, lambda: attention(layers.MultiHeadAttention(2, 3, name="mha")), [f"/{part}" for part in ATTENTION]),
    (None, lambda: attention(layers.GroupQueryAttention(4, 2, 1, name="gqa")), [f"/{part}" for part in ATTENTION]),
]


def kind_of(value):
    made = value() if callable(value) else None
    return "" if made is None else getattr(made, "layers", [made])[-1].__class__.__name__


@pytest.mark.parametrize(("shape", "make", "expected"), PLAIN, ids=kind_of)
def test_plain_layers_in_place(shape, make, expected):
    """Pruned at every update, held between them, still the layer it was."""
    model = make() if shape is None else sequential(shape, make())
    generator, layer = np.random.default_rng(0), model.layers[-1]
    pruning, optimizer = GradualPruning(PolynomialDecay(0.0, 0.8, 1, 5, frequency=2)), keras.optimizers.Adam(0.1)
    pruning.start(model)
    weights = pruning._weights
    assert sorted(re.sub(r"_\d+", "", w.name) for w in weights) == sorted(
        re.sub(r"_\d+", "", layer.name) + name for name in expected
    )
    config = keras.saving.serialize_keras_object(model)
    for step in range(1, 7):
        gradients = [generator.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
        for weight in weights:
            assert_zero_where_pruned({"": weight.kernel()}, {"": weight.mask()}, f"{weight.name} {step}")
        pruning.update(step)
    kernels = [weight.kernel() for weight in weights]
    pruning.finish()
    for kernel in kernels:
        assert np.count_nonzero(kernel) == round(0.2 * kernel.size)
    left = sum(np.count_nonzero(v) == v.shape.num_elements() for v in model.trainable_variables)
    assert left == len(model.trainable_variables) - len(weights)  # nothing else has lost a weight
    assert keras.saving.serialize_keras_object(model) == config and "keras_sparse" not in str(config)


def test_which_plain_layers():
    """Depthwise kernels hold few weights and much accuracy: only where they are asked for."""
    inner = sequential(
        (8, 8, 6), layers.Conv2D(6, 3, padding="same", name="conv"), layers.BatchNormalization(name="bn")
    )
    inner.name = "block"
    shared = layers.Dense(6, name="shared")
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(6, 1, name="stem")(x)
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = inner(inner(y))
    y = shared(shared(y))
    y = layers.Reshape((64, 6), name="flat")(y)
    y = layers.DepthwiseConv1D(3, name="depthwise1d")(y)
    y = layers.MultiHeadAttention(2, 3, name="attention")(y, y)
    model = keras.Model(x, layers.SpectralNormalization(layers.Dense(2, name="last"), name="norm")(y))
    attention = [f"attention/{part}" for part in ATTENTION]
    assert names(model) == ["stem", "block/conv", "shared", *attention, "norm/last"]
    for pattern in ("block/bn", "flat", layers.Reshape):
        with pytest.raises(ValueError, match="`include` must name layers that can be pruned here; '.*' .* cannot"):
            masked_weights(model, include=pattern)
    assert names(model, include="depthwise") == ["depthwise"]
    assert names(model, include=layers.DepthwiseConv1D) == ["depthwise1d"]
    # What encloses a layer stands for what is in it.
    assert names(model, include=["block", layers.MultiHeadAttention]) == ["block/conv", *attention]
    assert names(model, include=keras.Model) == ["block/conv"]
    assert names(model, exclude=["attention", "block", "depthwise"]) == ["stem", "shared", "norm/last"]


def test_single_weights_of_a_layer():
    """By path and key; those that are off by default come in by their own name alone."""
    model = sequential(
        (9, 4),
        layers.SeparableConv1D(6, 3, name="sep"),
        layers.Bidirectional(layers.LSTM(3, name="lstm"), name="both"),
        layers.Dense(2, name="head"),
    )
    ways = [f"both/{way}_lstm/lstm_cell" for way in ("forward", "backward")]
    cells = [f"{way}/{key}" for way in ways for key in RNN]
    recurrent = cells[1::2]
    assert names(model) == ["sep/pointwise_kernel", *cells, "head"]
    assert names(model, include=["sep", "head"]) == ["sep/pointwise_kernel", "head"]
    assert names(model, include="sep/.*") == ["sep/depthwise_kernel", "sep/pointwise_kernel"]
    assert names(model, include="sep/depthwise_kernel") == ["sep/depthwise_kernel"]
    assert names(model, include=".*/recurrent_kernel") == recurrent
    assert names(model, include=recurrent[0]) == recurrent[:1]
    assert names(model, include=layers.LSTM) == cells
    assert names(model, include="both", exclude=".*/kernel") == recurrent
    assert names(model, exclude=["both", "sep/depthwise_kernel"]) == ["sep/pointwise_kernel", "head"]
    targets = {".*/recurrent_kernel": 0.25, "both": 0.75, "head/kernel": 0.0}
    pruning = GradualPruning(OneShot(0.5), targets=targets)
    pruning.start(model)
    wanted = {name: 0.25 if name in recurrent else 0.75 if name in cells else 0.0 for name in names(model)}
    wanted["sep/pointwise_kernel"] = 0.5
    assert pruning.history[0]["layers"] == pytest.approx(wanted, abs=0.02)


class Gated(layers.Layer):
    """A user's own layer: an attribute, a list of weights, a vector."""

    def build(self, shape):
        self.w_in = self.add_weight(shape=(shape[-1], 8), name="w_in")
        self.gates = [self.add_weight(shape=(8, 8), name=f"gate_{i}") for i in range(2)]
        self.scale = self.add_weight(shape=(8,), name="scale")
        self.kernel = self.add_weight(shape=(8, 3), name="kernel")

    def call(self, x):
        x = keras.ops.matmul(x, self.w_in) * self.scale
        return keras.ops.matmul(keras.ops.matmul(keras.ops.matmul(x, self.gates[0]), self.gates[1]), self.kernel)


class Declared(Gated):
    def get_prunable_weights(self):
        return [self.w_in, self.gates[1], self.scale]


def test_weights_of_ones_own_layers(fit):
    def network(make=Gated):
        inner = sequential((8,), make(name="inner"))
        inner.name = "block"
        return sequential((6,), make(name="outer"), layers.Dense(8, "tanh", name="dense"), inner)

    assert names(network()) == ["outer", "dense", "block/inner"]  # what is called `kernel`
    own = [f"{path}/{key}" for path in ("outer", "block/inner") for key in ("w_in", "gate_1")]
    assert names(network(Declared)) == [*own[:2], "dense", *own[2:]]
    assert names(network(), weights={Gated: ["w_in", "gate_1"]}) == [*own[:2], "dense", *own[2:]]
    assert names(network(), weights={Gated: "gate_0"}) == ["outer", "dense", "block/inner"]
    assert names(network(), weights={"block": ["w_in", "kernel"]}) == [
        "outer",
        "dense",
        "block/inner/w_in",
        "block/inner/kernel",
    ]
    assert names(network(), weights={"o.*r": ("w_in", "gate_0")}, include="outer") == ["outer/w_in", "outer/gate_0"]
    sparse = ks.sparsify(network(), "weight")
    assert names(sparse) == ["dense"]
    assert names(sparse, weights={"outer": "w_in"}) == ["outer", "dense"]
    for weights, message in (
        ({"nothing": "w_in"}, r"`weights` must match a layer; the layers are 'outer', 'dense', 'block/inner'"),
        ({Gated: "w_out"}, r"`weights` must name weights of rank 2 .* 'Gated' matches; 'outer' has 'w_in' \(6, 8\), "),
        ({Gated: ["w_in", "scale"]}, r"weights of rank 2 or more .*'scale' \(8,\).*Received: weights='scale'"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_weights(network(), weights=weights)
    model = network()
    fit(model, GradualPruning(OneShot(0.5, 3), weights={Gated: ["w_in", "gate_1"]}), epochs=1)
    for path in ("outer", "block/inner"):
        layer = model.get_layer("outer") if path == "outer" else model.get_layer("block").get_layer("inner")
        zeros = {v.name: int((to_numpy(v) == 0).sum()) for v in layer.weights}
        size = layer.w_in.shape[0] * 8
        assert zeros == {"w_in": size // 2, "gate_0": 0, "gate_1": 32, "scale": 0, "kernel": 0}


def test_granularities_need_channels():
    """Where the last two axes are not input and output channels, only single weights can be told apart."""
    shared = sequential((8, 8, 4), layers.Conv2D(6, 3, name="conv"))
    assert masked_weights(shared, ks.granularity.get("feature_map"))[0].mask().shape == (1, 1, 1, 6)
    rows = sequential((9,), layers.Embedding(11, 5, name="table"), layers.LSTM(3, name="lstm"))
    shapes = [weight.mask().shape for weight in masked_weights(rows, ks.granularity.get("channel"))]
    assert shapes == [(11, 1), (5, 1), (3, 1)]
    matrix = sequential((9, 4), layers.EinsumDense("abc,cd->abd", output_shape=(None, 3)))
    assert masked_weights(matrix, ks.granularity.get("group"))[0].mask().shape == (4, 1)
    for shape, layer in (
        ((9, 9, 4), layers.Conv2DTranspose(6, 3, name="x")),
        ((9, 9, 4), layers.DepthwiseConv2D(3, name="x")),
        ((9, 4), layers.EinsumDense("abc,cde->abde", output_shape=(None, 3, 5), name="x")),
        ((9, 4), layers.EinsumDense("abc,dc->abd", output_shape=(None, 3), name="x")),
    ):
        model = sequential(shape, layer)
        assert masked_weights(model, ks.granularity.get("weight"), include="x")
        with pytest.raises(
            ValueError, match="`granularity` must be 'weight' for 'x': .* Received: granularity='channel'"
        ):
            masked_weights(model, ks.granularity.get("channel"), include="x")


def test_zeros_count_as_pruned():
    """The only trace of pruning in a plain model; a kernel of zeros alone is one that is not trained yet."""
    model = sequential((4,), layers.Dense(5, name="a"), layers.Dense(3, kernel_initializer="zeros", name="b"))
    kernel = to_numpy(model.get_layer("a").kernel).copy()
    kernel[:2], kernel[2, 0] = 0, 0
    model.get_layer("a").kernel.assign(kernel)
    pruning = GradualPruning(OneShot(0.0))
    assert pruning.start(model) == pytest.approx(11 / 35)
    masks = {weight.name: weight.mask() for weight in pruning._weights}
    np.testing.assert_array_equal(masks["a"], kernel != 0)
    np.testing.assert_array_equal(masks["b"], np.ones((5, 3)))
    pruning.finish()
    pruning = GradualPruning(OneShot(0.0), "group")  # a unit is pruned when all of it is zero
    pruning.start(model)
    np.testing.assert_array_equal(pruning._weights[0].mask(), [[0], [0], [1], [1]])


# Which layers, at which granularity.


def test_sparse_layers_are_taken_first(cnn):
    model = ks.sparsify(cnn(), include=["conv", "point"])
    assert names(model) == ["conv", "point"]
    assert names(model, exclude="point") == ["conv"]
    assert names(model, include="head") == ["head"]  # a plain one, asked for by name
    assert names(model, include=".*") == ["conv", "point", "head"]
    assert names(model, include=keras.layers.Conv2D, exclude="conv") == ["point"]
    assert [type(weight) for weight in masked_weights(model, include=".*")] == [LayerMask, LayerMask, InPlaceMask]
    assert names(cnn()) == ["conv", "point", "head"]
    for options, message in (
        ({"include": "nothing"}, "`include` must match a layer; the layers are 'conv', 'point', 'head'"),
        ({"include": ["conv", "pool"]}, r"'pool' \(GlobalAveragePooling2D\) cannot"),
        ({"exclude": "nothing"}, "`exclude` must match a layer"),
        ({"include": "conv", "exclude": "c.*"}, "`model` must hold a layer with a kernel that `include` names"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_weights(model, **options)


def test_a_mixed_model_is_pruned_in_both_ways(cnn, fit):
    model = ks.sparsify(cnn(), granularity="connection", include=["conv", "point"])
    head = model.get_layer("head")
    fit(model, GradualPruning(OneShot(0.5, 3)), epochs=1)
    assert np.count_nonzero(to_numpy(head.kernel)) == 18
    fit(model, GradualPruning(OneShot(0.75, 13), include=["conv", "head"]), epochs=1)
    counts = {
        layer.name: np.count_nonzero(to_numpy(layer.kernel)) for layer in model.layers if hasattr(layer, "kernel")
    }
    assert counts == {"conv": 2 * 9, "point": 12, "head": 4}


# granularity of the layer: those that a callback may prune it at
COARSER = {
    "weight": {"weight", "connection", "group", "feature_map", "channel"},
    "connection": {"connection", "feature_map", "channel"},
    "group": {"group", "channel"},
    "feature_map": {"feature_map"},
    "channel": {"channel"},
}


@pytest.mark.parametrize("own", COARSER)
def test_granularities_coarser_than_the_layers(own):
    for granularity in ks.granularity.names():
        model = sequential((6, 6, 4), ks.layers.SparseConv2D(8, 3, granularity=own, name="conv"))
        layer = model.get_layer("conv")
        if granularity not in COARSER[own]:
            rule = (
                f"`granularity` must be None or one whose units hold whole units of layer 'conv', which has .*'{own}'"
            )
            with pytest.raises(ValueError, match=rule):
                masked_weights(model, granularity=ks.granularity.get(granularity))
            continue
        # Every third unit is pruned already; what is left of it inside the blocks that stay is not touched.
        pattern = (np.arange(layer.mask.shape.num_elements()) % 3 > 0).reshape(layer.mask.shape).astype("float32")
        layer.assign_mask(pattern)
        pruning = GradualPruning(OneShot(0.5), granularity)
        pruning.start(model)
        mask, units = to_numpy(layer.mask), pruning._weights[0].mask()
        assert units.shape == ks.granularity.get(granularity).mask_shape((3, 3, 4, 8))
        np.testing.assert_array_equal(mask, pattern * units)
        axes = tuple(axis for axis, size in enumerate(units.shape) if size == 1)
        before = np.broadcast_to(pattern, (3, 3, 4, 8)).max(axis=axes, keepdims=True)
        assert units.sum() == min(round(units.size / 2), before.sum())
        assert_zero_where_pruned({"conv": to_numpy(layer.kernel)}, {"conv": mask})
        assert pruning.history[0]["sparsity"] == pytest.approx(1 - np.broadcast_to(mask, (3, 3, 4, 8)).mean())


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_n_of_m(cnn, fit, recorder, kind, allocation):
    """Gradually, along ragged runs of input channels, in plain and in sparse layers."""
    granularity = ks.granularity.n_m(2, 4)
    pruning = GradualPruning(PolynomialDecay(0.0, 0.5, 2, 10, frequency=4), "2:4", allocation=allocation)
    model, record = cnn(kind, "weight"), recorder(pruning)
    fit(model, pruning, record, epochs=1)
    for kernels, masks in zip(record.kernels, record.masks):
        assert_zero_where_pruned(kernels, masks)
    pruned = {layer.name: to_numpy(layer.kernel) != 0 for layer in model.layers if hasattr(layer, "kernel")}
    for name, kept in pruned.items():
        assert granularity.preferred(np.where(kept, 1.0, -np.inf))[kept].all(), name  # 2 of 4 at most
    total = sum(kept.size for kept in pruned.values())
    # `conv` has but two input channels: globally it stays dense, and half of all weights is more than the rule takes.
    assert sum(kept.sum() for kept in pruned.values()) == pytest.approx(total / 2, abs=1)
    if allocation == "uniform":
        assert all(kept.sum() == kept.size // 2 for kept in pruned.values())


def test_n_of_m_must_be_reached(mlp, fit):
    for options, argument in (
        ({"schedule": OneShot(0.4)}, "schedule"),
        ({"schedule": OneShot(0.5), "targets": {"a": 0.25}}, "targets"),
    ):
        with pytest.raises(ValueError, match=f"`{argument}` must end at a sparsity of at least 0.5 for 'a', .* '2:4'"):
            fit(mlp(), GradualPruning(granularity="2:4", **options))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("taps", [True, False])
def test_blocks(cnn, fit, recorder, kind, allocation, taps):
    """Tiles of 2 x 4 channels: whole ones and those of the edges are kept or pruned together."""
    block = ks.granularity.block(2, 4, taps)
    pruning = GradualPruning(PolynomialDecay(0.0, 0.6, 2, 10, frequency=4), block, "mean", allocation)
    model, record = cnn(kind, block), recorder(pruning)
    fit(model, pruning, record, epochs=1)
    for name, kernel in stored(model).items():
        units = record.masks[-1][name]
        assert units.shape == block.units_shape(kernel.shape)
        assert_zero_where_pruned({name: kernel}, {name: block.expand(units, kernel.shape)})
    kernels = stored(model).values()
    zeros = sum((kernel == 0).sum() for kernel in kernels) / sum(kernel.size for kernel in kernels)
    assert pruning.history[-1]["sparsity"] == pytest.approx(zeros)
    if allocation == "uniform":
        for units in record.masks[-1].values():
            assert units.sum() == max(1, round(units.size * 0.4))
    elif taps:  # to half a unit
        assert zeros == pytest.approx(0.6, abs=4 / 114)


def test_masks_of_blocks_are_made_of_blocks():
    block = ks.granularity.block(2, 4)
    model = sequential((6,), ks.layers.SparseDense(8, granularity=block, name="a"))
    layer = model.get_layer("a")
    mask = np.ones((6, 8), "float32")
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"`mask` must keep or prune whole units of granularity 'block\(2, 4\)'"):
        layer.assign_mask(mask)
    mask[:2, :4] = 0
    layer.assign_mask(mask)
    with pytest.raises(ValueError, match="`mask_initializer` must keep or prune whole units"):
        wrong = ks.layers.SparseDense(8, granularity=block, mask_initializer=ks.initializers.RandomMask(0.5))
        wrong.build((None, 6))
    for other in ("weight", "feature_map", ks.granularity.block(2, 2), "2:4"):
        with pytest.raises(ValueError, match="`granularity` must be None or one whose units hold whole units"):
            masked_weights(model, ks.granularity.get(other))
    # A callback's blocks leave what a layer of single weights has pruned in them.
    fine = sequential((6,), ks.layers.SparseDense(8, name="a")).get_layer("a")
    pattern = (np.arange(48) % 3 > 0).reshape(6, 8).astype("float32")
    fine.assign_mask(pattern)
    (weight,) = masked_weights(sequential((6,), fine), block)
    weight.assign(np.array([[1, 0], [0, 1], [1, 1]], "float32"))
    np.testing.assert_array_equal(to_numpy(fine.mask), pattern * block.expand(weight.mask(), (6, 8)))


def test_finer_than_the_layers_raises_before_training(cnn, fit):
    model = cnn("sparse", "feature_map")
    weights = model.get_weights()
    with pytest.raises(
        ValueError, match="`granularity` must be None or one whose units hold whole units of layer 'conv'"
    ):
        fit(model, GradualPruning(OneShot(0.5), "connection"), epochs=1)
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)


def test_feature_maps_over_connections_in_fit(cnn, fit, recorder):
    """First connections, then whole maps of what is left of them, then densely again within the maps."""
    model = cnn("sparse", "connection")
    fit(model, GradualPruning(OneShot(0.5), criterion="random"), epochs=1)
    connections = own_masks(model)
    fit(model, GradualPruning(OneShot(0.5, 13), "feature_map"), epochs=1)
    both = own_masks(model)
    for name, mask in both.items():
        assert (mask <= connections[name]).all()
        maps = mask.any(axis=tuple(range(mask.ndim - 1)))
        assert maps.sum() == min(round(maps.size / 2), connections[name].any(axis=tuple(range(mask.ndim - 1))).sum())
        np.testing.assert_array_equal(mask[..., maps], connections[name][..., maps])
    assert_zero_where_pruned({name: kernel for name, kernel in stored(model).items()}, both)


def test_growth_starts_from_zero(kind):
    """Whatever momentum or a loaded file left in a variable, a weight that comes back is zero."""
    dense = layers.Dense if kind == "plain" else ks.layers.SparseDense
    model = sequential((6,), dense(8, name="a"))
    pruning = GradualPruning(Doubling(0.25, 1.0, frequency=1))
    pruning.start(model)
    (weight,) = pruning._weights
    mask, layer = weight.mask(), model.get_layer("a")
    layer._kernel.assign(np.ones((6, 8)))
    pruning.update(1)
    np.testing.assert_array_equal(to_numpy(layer.kernel) != 0, mask == 1)
    assert weight.mask().sum() == 24 and (weight.mask() >= mask).all()
