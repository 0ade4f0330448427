"""Models and schedules of TFMOT, made into Keras 3 models with masks and schedules of this package."""

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.tfmot
tfmot = pytest.importorskip("tensorflow_model_optimization")
tf_keras = pytest.importorskip("tf_keras")

import keras_sparse as ks  # noqa: E402
from keras_sparse.interop.tfmot import convert_model, convert_schedule  # noqa: E402

theirs = tfmot.sparsity.keras
parts = tf_keras.layers


def prune(model, sparsity=0.75, steps=6, shape=None, loss="mse"):
    """Wrap a model, train it a little with TFMOT; pruned weights are zero as at the end of an epoch."""
    schedule = theirs.ConstantSparsity(sparsity, 2, frequency=2)
    pruned = theirs.prune_low_magnitude(model, pruning_schedule=schedule)
    pruned.compile(tf_keras.optimizers.Adam(0.01), loss)
    generator = np.random.default_rng(0)
    x = generator.random((4 * steps, *(shape or pruned.input_shape[1:])), "float32")
    y = generator.random((4 * steps, *pruned.output_shape[1:]), "float32")
    pruned.fit(x, y, batch_size=4, verbose=0, callbacks=[theirs.UpdatePruningStep()])
    return pruned, x


def assert_same_outputs(old, new, x):
    np.testing.assert_allclose(new.predict(x, verbose=0), old.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


def sequential():
    return tf_keras.Sequential(
        [
            parts.Conv2D(6, 3, activation="relu", input_shape=(8, 8, 3), name="conv"),
            parts.BatchNormalization(name="norm"),
            parts.Dropout(0.5),
            parts.Flatten(),
            parts.Dense(5, kernel_regularizer="l2", name="dense"),
            parts.Softmax(),
        ]
    )


def functional():
    inputs = tf_keras.Input((8, 8, 3), name="image")
    shared = parts.Conv2D(3, 3, padding="same", name="shared")
    block = tf_keras.Sequential(
        [parts.Conv2D(4, 1, input_shape=(8, 8, 3), name="inner"), parts.ReLU(6.0)], name="block"
    )
    x = parts.Add()([shared(inputs), inputs])
    x = parts.Concatenate()([block(shared(x)), block(x)])
    x = parts.SeparableConv2D(5, 3, name="separable")(parts.DepthwiseConv2D(3, name="depthwise")(x))
    x = parts.GlobalAveragePooling2D(keepdims=True)(x)
    return tf_keras.Model(inputs, parts.Dense(2, name="out")(parts.Flatten()(x)), name="functional")


def test_sequential():
    pruned, x = prune(sequential())
    model = convert_model(pruned)
    assert isinstance(model, keras.Sequential)
    assert [layer.name for layer in model.layers] == [layer.layer.name for layer in pruned.layers]
    for name in ("conv", "dense"):
        layer = model.get_layer(name)
        assert isinstance(layer, ks.layers.BaseSparse)
        (variables,) = pruned.get_layer(f"prune_low_magnitude_{name}").pruning_vars
        np.testing.assert_array_equal(np.asarray(layer.mask), variables[1].numpy())
        np.testing.assert_array_equal(np.asarray(layer.kernel), variables[0].numpy() * variables[1].numpy())
    assert_same_outputs(theirs.strip_pruning(pruned), model, x)
    assert isinstance(model.get_layer("dense").kernel_regularizer, keras.regularizers.L2)


def test_functional_with_nested_and_shared_layers():
    plain = functional()
    for weight in plain.weights:  # zeros from elsewhere
        if "kernel" in weight.name:
            weight.assign(weight * (np.random.default_rng(1).random(weight.shape) < 0.4))
    x = np.random.default_rng(0).random((3, 8, 8, 3), "float32")
    model = convert_model(plain)
    assert_same_outputs(plain, model, x)
    sparse = {p for p, layer in ks.selection.flatten_layers(model).items() if isinstance(layer, ks.layers.BaseSparse)}
    assert sparse == {"shared", "block/inner", "out"}
    assert model.input.name == "image"
    kernel = np.asarray(model.get_layer("separable").pointwise_kernel)
    assert 0.4 < (kernel == 0).mean() < 0.8  # left as zeros, which GradualPruning takes for the mask
    assert model.count_params() - plain.count_params() == sum(
        np.asarray(layer.mask).size for layer in ks.selection.flatten_layers(model).values() if hasattr(layer, "mask")
    )


def test_wrapped_functional():
    inputs = tf_keras.Input((6,))
    x = parts.Dense(8, "tanh", name="a")(inputs)
    y = parts.Dense(8, name="b")(x)
    pruned, x = prune(tf_keras.Model(inputs, parts.Dense(2, name="c")(parts.Add()([x, y]))), 0.5)
    model = convert_model(pruned, exclude="c")
    assert isinstance(model.get_layer("a"), ks.layers.SparseDense) and type(model.get_layer("c")) is keras.layers.Dense
    assert ks.count(model)["layers"]["a"]["sparsity"] == ks.count(model)["layers"]["c"]["sparsity"] == 0.5
    assert_same_outputs(theirs.strip_pruning(pruned), model, x)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: parts.LSTM(5),
        lambda: parts.GRU(5, return_sequences=False),
        lambda: parts.SimpleRNN(5),
        lambda: parts.Bidirectional(parts.LSTM(4)),
        lambda: parts.Conv1D(4, 3),
        lambda: parts.RNN([parts.LSTMCell(4), parts.GRUCell(3)]),
    ],
    ids=["lstm", "gru", "rnn", "bidirectional", "conv1d", "cells"],
)
def test_recurrent_and_other_layers(layer):
    plain = tf_keras.Sequential(
        [parts.Embedding(11, 6, input_length=7), parts.Dropout(0.2), layer(), parts.Flatten(), parts.Dense(2)]
    )
    plain.set_weights([w * (np.random.default_rng(2).random(w.shape) < 0.5) for w in plain.get_weights()])
    x = np.random.default_rng(0).integers(0, 11, (3, 7))
    assert_same_outputs(plain, convert_model(plain), x)


def test_wrapped_embedding_and_lstm():
    body = [parts.Embedding(11, 6, input_length=7, name="e"), parts.LSTM(5, name="rnn"), parts.Dense(2, name="d")]
    pruned, _ = prune(tf_keras.Sequential(body), 0.5, shape=(7,))
    model = convert_model(pruned)
    cell = model.get_layer("rnn").cell
    for weight in (model.get_layer("e").embeddings, cell.kernel, cell.recurrent_kernel):
        assert (np.asarray(weight) == 0).mean() == pytest.approx(0.5, abs=0.02)
    x = np.random.default_rng(0).integers(0, 11, (3, 7))
    assert_same_outputs(theirs.strip_pruning(pruned), model, x)
    pruning = ks.callbacks.GradualPruning(ks.schedules.OneShot(0.5))
    model = ks.strip(model)
    pruning.start(model)  # knows the zeros: nothing more is pruned
    assert sum(record["sparsity"] for record in pruning.history) == pytest.approx(0.5, abs=0.02)


def test_training_goes_on():
    pruned, x = prune(sequential(), 0.5)
    model = convert_model(pruned)
    kernel = np.asarray(model.get_layer("conv").kernel)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    schedule = ks.schedules.PolynomialDecay(0.5, 0.9, 0, 8, frequency=2)
    model.fit(
        x, np.zeros((len(x), 5)), batch_size=4, epochs=2, verbose=0, callbacks=[ks.callbacks.GradualPruning(schedule)]
    )
    after = np.asarray(model.get_layer("conv").kernel)
    assert (after[kernel == 0] == 0).all() and (after == 0).mean() == pytest.approx(0.9, abs=0.01)


def test_a_model_that_is_not_pruned_yet():
    model = convert_model(theirs.prune_low_magnitude(sequential(), theirs.ConstantSparsity(0.5, 0)))
    assert not any(isinstance(layer, ks.layers.BaseSparse) for layer in model.layers)


def test_granularity_of_the_masks():
    plain = sequential()
    conv = plain.get_layer("conv")
    kernel = conv.get_weights()[0]
    kernel[:, :, 1, 2:5] = 0
    kernel[0, 0] = 0
    conv.set_weights([kernel, conv.get_weights()[1]])
    layer = convert_model(plain, "connection").get_layer("conv")
    assert layer.mask.shape == (1, 1, 3, 6) and float(np.asarray(layer.mask).sum()) == 15
    np.testing.assert_array_equal(np.asarray(layer.kernel), kernel)


def test_mixed_precision():
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        pruned, x = prune(sequential(), 0.5)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    model = convert_model(pruned)
    assert model.get_layer("conv").compute_dtype == "float16"
    assert ks.count(model)["layers"]["conv"]["sparsity"] == pytest.approx(0.5, abs=0.01)


class Own(tf_keras.layers.Layer):
    def call(self, x):
        return x * 2


class OwnInKeras3(keras.layers.Layer):
    def call(self, x):
        return x * 2


def test_layers_of_ones_own():
    plain = tf_keras.Sequential([parts.Dense(3, input_shape=(4,)), Own(name="own")])
    with pytest.raises(ValueError, match="`model` must hold layers that Keras 3 has; 'own' is of class Own"):
        convert_model(plain)
    model = convert_model(plain, custom_objects={"Own": OwnInKeras3})
    assert_same_outputs(plain, model, np.ones((2, 4)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x: x * 2.0, "'tf.math.multiply' is of class TFOpLambda"),
        (lambda x: parts.Lambda(lambda t: t)(x), "is of class Lambda"),
        (lambda x: parts.ThresholdedReLU(name="t")(x), "'t' is of class ThresholdedReLU"),
        (lambda x: parts.LSTM(2, time_major=True, name="n")(parts.Reshape((4, 1))(x)), "'n' .LSTM. has `time_major`"),
    ],
    ids=["operation", "lambda", "gone", "argument"],
)
def test_what_keras_3_lacks(build, message):
    inputs = tf_keras.Input((4,))
    with pytest.raises(ValueError, match=message):
        convert_model(tf_keras.Model(inputs, build(inputs)))


def test_subclassed_and_unbuilt_models():
    class Subclassed(tf_keras.Model):
        def call(self, x):
            return x

    model = Subclassed(name="mine")
    with pytest.raises(ValueError, match="`model` must be built"):
        convert_model(model)
    model.build((None, 3))
    with pytest.raises(ValueError, match="`model` must be, and hold, Sequential and functional models only"):
        convert_model(model)


def test_schedules():
    mine = convert_schedule(theirs.PolynomialDecay(0.1, 0.9, 5, 25, power=2, frequency=10))
    assert mine == ks.schedules.PolynomialDecay(0.1, 0.9, 4, 24, power=2, frequency=10)
    assert convert_schedule(theirs.ConstantSparsity(0.5, 7)) == ks.schedules.ConstantSparsity(0.5, 6)
    assert convert_schedule(theirs.ConstantSparsity(0.5, 0, 30, 10)) == ks.schedules.ConstantSparsity(0.5, 0, 29, 10)

    class Own(theirs.PruningSchedule):
        def __call__(self, step):
            return True, 0.5

        def get_config(self):
            return {"class_name": "Own", "config": {}}

    with pytest.raises(TypeError, match="`pruning_schedule` must be a TFMOT PolynomialDecay or ConstantSparsity"):
        convert_schedule(Own())
    with pytest.raises(ValueError, match="`frequency` must be at most end_step - begin_step"):
        convert_schedule(theirs.PolynomialDecay(0.1, 0.9, 5, 25, frequency=100))
