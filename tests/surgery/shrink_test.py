"""What is removed is counted by hand; outputs are compared, on random networks of all kinds of layers too."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse import granularity as granularities
from keras_sparse import selection
from keras_sparse.surgery.shrink import shrink_counted


def filled(model, seed=0):
    """Give all weights values that are nowhere their defaults."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        positive = weight.name == "moving_variance"
        weight.assign(rng.uniform(0.5, 2.0, weight.shape) if positive else rng.normal(0.0, 0.3, weight.shape))
    return model


def kernel_of(layer):
    return selection.kernel_variable(layer)


def values_of(variable):
    return keras.ops.convert_to_numpy(variable).copy()


def cut(layer, inputs=(), outputs=(), bias=None):
    """Zero what a layer reads of some inputs, and what makes some outputs, with their bias."""
    kernel = keras.ops.convert_to_numpy(kernel_of(layer)).copy()
    kernel[..., list(inputs), :] = 0
    kernel[..., list(outputs)] = 0
    kernel_of(layer).assign(kernel)
    if layer.bias is not None and bias is not None:
        values = keras.ops.convert_to_numpy(layer.bias).copy()
        values[list(outputs)] = bias
        layer.bias.assign(values)


def shapes(model):
    """`{path: (inputs, outputs)}` of the layers with a kernel."""
    found = selection.flatten_layers(model)
    return {path: tuple(kernel_of(x).shape[-2:]) for path, x in found.items() if kernel_of(x) is not None}


def inputs_for(model, batch=3, open_size=9):
    rng = np.random.default_rng(7)
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input

    def values(tensor):
        shape = [open_size if size is None else size for size in tensor.shape[1:]]
        return rng.normal(size=(batch, *shape)).astype("float32")

    return keras.tree.map_structure(values, structure)


def assert_same(model, small, tolerance=2e-5, open_size=9):
    inputs = inputs_for(model, open_size=open_size)
    for before, after in zip(keras.tree.flatten(model(inputs)), keras.tree.flatten(small(inputs)), strict=True):
        before, after = (keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")) for y in (before, after))
        assert np.ptp(before, axis=0).max() > 1e-4, "a test of constant outputs proves nothing"
        np.testing.assert_allclose(after, before, rtol=0, atol=tolerance * np.abs(before).max())


def sequential(*stack, shape=(10, 9, 3)):
    return filled(keras.Sequential([keras.Input(shape), *stack], name="net"))


# What nothing reads.


@pytest.mark.parametrize("pooling", [layers.MaxPooling2D(2), layers.AveragePooling2D(3, 1, padding="same")])
@pytest.mark.parametrize("activation", ["relu", "sigmoid", layers.LeakyReLU()])
def test_an_empty_pattern_takes_the_filter_before_it(activation, pooling):
    model = ks.sparsify(
        sequential(
            layers.Conv2D(8, 3, padding="same", name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Activation(activation),
            pooling,
            layers.Conv2D(6, 3, padding="same", strides=2, name="second"),
        ),
        granularity="group",
    )
    first, second = model.get_layer("first"), model.get_layer("second")
    pattern = np.random.default_rng(1).random((3, 3, 8, 1)) < 0.5
    pattern[1, 1] = True
    pattern[:, :, [2, 3, 7]] = False
    second.assign_mask(pattern)
    small = ks.shrink(model)
    assert shapes(small) == {"first": (3, 5), "second": (5, 6)}
    assert small.get_layer("norm").gamma.shape == (5,)
    kept = [0, 1, 4, 5, 6]
    assert type(small.get_layer("second")) is ks.layers.SparseConv2D
    np.testing.assert_array_equal(small.get_layer("second").mask, pattern[:, :, kept])
    np.testing.assert_array_equal(small.get_layer("first").kernel, np.asarray(first.kernel)[..., kept])
    np.testing.assert_array_equal(small.get_layer("first").bias, np.asarray(first.bias)[kept])
    np.testing.assert_array_equal(
        small.get_layer("norm").moving_mean, np.asarray(model.get_layer("norm").moving_mean)[kept]
    )
    assert_same(model, small)
    before, after = ks.count(model)["total"], ks.count(small)["total"]
    # Three filters of 3x3x3 weights and a bias, three channels of normalisation, three empty input maps of 3x3x6.
    assert before["params"] - after["params"] == 3 * (27 + 1) + 3 * 4 + 3 * 54
    assert before["madds"] - after["madds"] == 3 * 27 * 10 * 9


@pytest.mark.parametrize("granularity", granularities.names())
def test_masks_of_every_granularity(granularity):
    model = ks.sparsify(
        sequential(
            layers.Conv2D(12, 3, name="a", activation="relu"),
            layers.Conv2D(16, 3, name="b", activation="relu"),
            layers.Flatten(),
            layers.Dense(9, activation="relu", name="c"),
            layers.Dense(5, name="d"),
        ),
        granularity,
    )
    rng = np.random.default_rng(3)
    for layer in model.layers:
        if isinstance(layer, ks.layers.BaseSparse) and layer.name != "d":
            mask = rng.random(layer.mask.shape) < 0.6
            if mask.shape[-2] > 1:
                mask[..., 1:4, :] = False
            if mask.shape[-1] > 1:
                mask[..., 4:6] = False
            layer.assign_mask(mask)
    small = ks.shrink(model)
    assert small.count_params() < model.count_params()
    assert_same(model, small)
    for layer in small.layers:
        if isinstance(layer, ks.layers.BaseSparse):
            shape = layer.granularity.mask_shape(kernel_of(layer).shape)
            assert tuple(layer.mask.shape) == shape
            raw, mask = np.asarray(kernel_of(layer)), np.asarray(layer.mask)
            np.testing.assert_array_equal(raw, raw * mask)
    assert_same(ks.strip(model), ks.shrink(ks.strip(model)))
    assert ks.shrink(ks.strip(model)).count_params() <= small.count_params()


@pytest.mark.parametrize(
    ("granularity", "zero", "expected"),
    [
        ("2:4", [4, 5, 6, 7], "2:4"),
        ("2:4", [0], "weight"),
        (granularities.block(2, 3), [2, 3], "block(2, 3)"),
        (granularities.block(2, 3, taps=False), [3], "connection"),
        ("connection", [3], "connection"),
    ],
)
def test_runs_and_blocks_stay_whole_or_become_plain(granularity, zero, expected):
    stack = [layers.Conv2D(12, 3, name="a", activation="relu"), layers.Conv2D(9, 3, name="b")]
    model = ks.sparsify(sequential(*stack), granularity, include="b")
    layer = model.get_layer("b")
    units = layer.granularity.units_shape((3, 3, 12, 9))
    scores = np.random.default_rng(1).normal(size=units)
    mask = layer.granularity.expand(layer.granularity.mask(scores, scores.size // 2), (3, 3, 12, 9))
    layer.assign_mask(mask)
    cut(model.get_layer("a"), outputs=zero, bias=-1.0)
    small = ks.shrink(model)
    assert small.get_layer("b").granularity.name == expected
    gone = sorted({*zero, *np.flatnonzero(~mask.any(axis=(0, 1, 3)))})
    np.testing.assert_array_equal(small.get_layer("b").mask, np.delete(mask, gone, axis=-2))
    assert_same(model, small)


def test_removal_goes_on_to_a_fixed_point():
    """What reads nothing but what is removed goes in turn, up and down the network."""
    names = "abcdef"
    model = sequential(*[layers.Conv2D(4, 1, name=name, use_bias=False) for name in names])
    for name in names[1:]:
        diagonal = np.eye(4, dtype="float32").reshape(1, 1, 4, 4)
        kernel_of(model.get_layer(name)).assign(diagonal)
    cut(model.get_layer("f"), inputs=[0])  # nobody reads chain 0
    cut(model.get_layer("a"), outputs=[1])  # chain 1 is zero
    cut(model.get_layer("d"), inputs=[2])  # chain 2 is unread before d, zero after it
    small = ks.shrink(model)
    assert shapes(small) == {"a": (3, 1), **dict.fromkeys("bcde", (1, 1)), "f": (1, 4)}
    assert_same(model, small)
    again = ks.shrink(small)
    assert shapes(again) == shapes(small)


# Constants.


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    ("activation", "bias", "constant"),
    [
        (None, 0.0, 0.0),
        ("relu", 0.0, 0.0),
        ("relu", -1.0, 0.0),
        (layers.LeakyReLU(), -1.0, -0.3),
        ("sigmoid", 0.0, 0.5),
        ("tanh", 0.5, 0.4621),
        (None, 2.0, 2.0),
    ],
)
def test_a_constant_map_is_folded_where_that_is_exact(activation, bias, constant, padding):
    model = sequential(
        layers.Conv2D(6, 3, name="first", activation=activation),
        layers.Conv2D(5, 3, padding=padding, use_bias=False, name="second"),
    )
    cut(model.get_layer("first"), outputs=[1, 4], bias=bias)
    small = ks.shrink(model)
    # The padding's zeros are no part of a constant map: at the border it contributes less.
    goes = constant == 0 or padding == "valid"
    assert shapes(small) == ({"first": (3, 4), "second": (4, 5)} if goes else {"first": (3, 6), "second": (6, 5)})
    new = small.get_layer("second")
    assert new.use_bias == (goes and constant != 0)
    if new.use_bias:
        kernel = np.asarray(model.get_layer("second").kernel)[:, :, [1, 4]]
        np.testing.assert_allclose(new.bias, constant * kernel.sum(axis=(0, 1, 2)), atol=1e-3)
    assert_same(model, small)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "taps", "goes"),
    [
        (9, 3, 1, 1, [1], True),  # the centre alone never sees the padding
        (9, 3, 1, 1, [0, 1], False),
        (9, 3, 2, 1, [0, 1], False),
        (8, 3, 2, 1, [0, 1], True),  # an even size is padded behind only
        (8, 3, 2, 1, [1, 2], False),
        (1, 3, 1, 1, [0, 1, 2], True),  # the outer taps see nothing but padding
        (9, 2, 1, 1, [0], True),
        (9, 2, 1, 1, [1], False),
        (9, 3, 1, 2, [1], True),
        (2, 3, 1, 2, [0, 1, 2], True),
        (3, 3, 1, 2, [0, 1, 2], False),
    ],
)
def test_which_taps_see_the_padding(size, kernel, stride, dilation, taps, goes):
    model = sequential(
        layers.Conv2D(4, 1, name="first", activation="sigmoid"),
        layers.Conv2D(5, (kernel, 1), strides=stride, dilation_rate=(dilation, 1), padding="same", name="second"),
        shape=(size, 8, 3),
    )
    cut(model.get_layer("first"), outputs=[2], bias=0.3)
    weights = np.asarray(model.get_layer("second").get_weights()[0])
    weights[[tap for tap in range(kernel) if tap not in taps], :, 2] = 0
    model.get_layer("second").kernel.assign(weights)
    small = ks.shrink(model)
    assert shapes(small)["second"] == ((3, 5) if goes else (4, 5))
    assert_same(model, small)


def test_constants_are_followed_through_every_layer_that_treats_channels_alone():
    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(6, 3, name="first", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Dropout(0.5)(layers.MaxPooling2D(2, padding="same")(x))
    x = keras.ops.tanh(x) * 2.0 - 3.0
    x = layers.PReLU(name="prelu")(layers.UpSampling2D(2)(x))
    x = layers.DepthwiseConv2D(2, depth_multiplier=2, activation="sigmoid", name="depthwise")(x)
    x = layers.Conv2D(4, 1, name="second")(x)
    model = filled(keras.Model(inputs, x))
    cut(model.get_layer("first"), outputs=[0, 5])
    alpha = values_of(model.get_layer("prelu").alpha)
    model.get_layer("prelu").alpha.assign(np.broadcast_to(alpha[:1, :1], alpha.shape))  # the same at each place
    small = ks.shrink(model)
    # Two maps are constant, as are the two times two that the depthwise layer makes of them.
    assert shapes(small) == {"first": (3, 4), "depthwise": (4, 2), "second": (8, 4)}
    assert_same(model, small)
    filled(model)
    cut(model.get_layer("first"), outputs=[0, 5])
    assert shapes(ks.shrink(model))["first"] == (3, 6)  # PReLU with slopes of their own for each place


def test_a_padded_constant_is_none():
    model = sequential(
        layers.Conv2D(4, 1, name="first", activation="sigmoid"),
        layers.ZeroPadding2D(1),
        layers.Conv2D(5, 3, name="second"),
    )
    cut(model.get_layer("first"), outputs=[2], bias=0.0)
    assert shapes(ks.shrink(model))["first"] == (3, 4)
    assert_same(model, ks.shrink(model))


def test_normalization_while_training_has_no_constants():
    inputs = keras.Input((8, 7, 3))
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(6, 3, name="first")(inputs), training=True)
    model = filled(keras.Model(inputs, layers.Conv2D(4, 1, name="second")(x)))
    cut(model.get_layer("first"), outputs=[0], bias=0.5)
    cut(model.get_layer("second"), inputs=[1])
    small = ks.shrink(model)
    assert shapes(small)["first"] == (3, 5)  # what nobody reads goes all the same
    assert_same(model, small)


# Where channels meet.


def residual(agree):
    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    for name in "ab":
        y = layers.ReLU()(layers.BatchNormalization()(x))
        y = layers.Conv2D(5, 3, padding="same", name=f"{name}1", activation="relu")(y)
        y = layers.Conv2D(6, 3, padding="same", name=f"{name}2")(y)
        x = layers.Add()([x, y])
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1, name="head")(x))
    model = filled(keras.Model(inputs, x))
    for name in ("a1", "b1", "head"):
        if agree or name != "b1":
            cut(model.get_layer(name), inputs=[1, 4])
    cut(model.get_layer("b2"), inputs=[0])
    return model


def test_a_residual_stream_is_thinned_where_all_its_readers_agree():
    model = residual(agree=True)
    small = ks.shrink(model)
    expected = {"stem": (3, 4), "a1": (4, 5), "a2": (5, 4), "b1": (4, 4), "b2": (4, 4), "head": (4, 4)}
    assert shapes(small) == expected
    assert_same(model, small)
    model = residual(agree=False)
    small = ks.shrink(model)
    assert shapes(small) == {**shapes(model), "b1": (6, 4), "b2": (4, 6)}
    assert_same(model, small)


def test_dense_blocks():
    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="c0")(inputs)
    for index in range(1, 4):
        y = layers.ReLU()(layers.BatchNormalization(name=f"n{index}")(x))
        y = layers.Conv2D(3, 3, padding="same", use_bias=False, name=f"c{index}")(y)
        x = layers.Concatenate()([x, y])
    x = layers.Dense(5, name="logits")(layers.Flatten()(layers.AveragePooling2D(2)(x)))
    model = filled(keras.Model(inputs, x))
    # Channels of the last concatenation: c0 0-3, c1 4-6, c2 7-9, c3 10-12.
    cut(model.get_layer("c1"), inputs=[0])
    cut(model.get_layer("c2"), inputs=[0, 5])
    cut(model.get_layer("c3"), inputs=[0, 5, 8])
    weights = values_of(model.get_layer("logits").kernel).reshape(-1, 13, 5)
    weights[:, [0, 5, 8, 9]] = 0
    model.get_layer("logits").kernel.assign(weights.reshape(-1, 5))
    small = ks.shrink(model)
    # 0, 5 and 8 are read by nobody; 9 by c3 alone.
    pixels = 4 * 3
    assert shapes(small) == {"c0": (3, 3), "c1": (3, 2), "c2": (5, 2), "c3": (7, 3), "logits": (pixels * 10, 5)}
    assert small.get_layer("n3").gamma.shape == (7,)
    assert_same(model, small)


@pytest.mark.parametrize("gather", ["flatten", "average", "max", "reshape", "reshape_open", "permute"])
def test_dense_layers_read_less(gather):
    stack = {
        "flatten": [layers.Flatten()],
        "average": [layers.GlobalAveragePooling2D()],
        "max": [layers.GlobalMaxPooling2D(keepdims=True), layers.Flatten()],
        "reshape": [layers.Reshape((20, 3, 6)), layers.Reshape((20, 18)), layers.Reshape((360,))],
        "reshape_open": [layers.Reshape((-1, 6)), layers.GlobalAveragePooling1D()],
        "permute": [layers.Permute((3, 1, 2)), layers.Flatten()],
    }[gather]
    model = sequential(
        layers.Conv2D(6, 1, name="conv", activation="sigmoid"), *stack, layers.Dense(5, name="dense"), shape=(10, 6, 3)
    )
    cut(model.get_layer("conv"), outputs=[1, 3], bias=0.4)
    small = ks.shrink(model)
    wide = kernel_of(model.get_layer("dense")).shape[0]
    assert shapes(small) == {"conv": (3, 4), "dense": (wide * 4 // 6, 5)}
    assert_same(model, small)


def test_gates_of_a_squeeze_and_excitation_block():
    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv")(inputs)
    gate = layers.Dense(4, activation="relu", name="squeeze")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    gate = layers.Dense(6, activation="sigmoid", name="excite")(gate)
    model = filled(keras.Model(inputs, layers.Conv2D(5, 3, padding="same", name="next")(layers.Multiply()([x, gate]))))
    cut(model.get_layer("conv"), outputs=[2])  # zero whatever its gate says
    cut(model.get_layer("next"), inputs=[0])  # read by the squeeze alone
    small = ks.shrink(model)
    assert shapes(small) == {"conv": (3, 5), "squeeze": (5, 4), "excite": (4, 5), "next": (5, 5)}
    assert_same(model, small)


def test_shared_layers():
    inputs = keras.Input((8, 7, 4))
    shared = layers.Conv2D(4, 3, padding="same", activation="relu", name="shared")
    x = shared(layers.ReLU()(shared(layers.Conv2D(4, 1, name="stem")(inputs))))
    model = filled(keras.Model(inputs, layers.Conv2D(5, 3, name="head")(x)))
    cut(model.get_layer("stem"), outputs=[1], bias=0.0)
    cut(shared, outputs=[1], bias=-1.0)  # zero before, between and after both calls
    cut(shared, inputs=[3])  # unread within, but read by the head
    cut(shared, inputs=[2])
    cut(model.get_layer("head"), inputs=[2])
    small = ks.shrink(model)
    assert shapes(small) == {"stem": (4, 2), "shared": (2, 2), "head": (2, 5)}
    assert_same(model, small)


def test_nested_models_get_smaller_inputs():
    def block(name):
        inside = keras.Input((8, 7, 6))
        y = layers.Conv2D(4, 3, padding="same", name="down", activation="relu")(inside)
        return keras.Model(inside, layers.Conv2D(6, 3, padding="same", name="up")(y), name=name)

    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(6, 1, name="stem")(inputs)
    twice = block("twice")
    x = twice(layers.ReLU()(twice(x)))
    tail = keras.Sequential([keras.Input((8, 7, 6)), layers.Conv2D(5, 3, name="conv")], name="tail")
    model = filled(keras.Model(inputs, layers.GlobalMaxPooling2D()(tail(x))))
    for layer in (twice.get_layer("down"), tail.get_layer("conv")):
        cut(layer, inputs=[0, 2])
    cut(twice.get_layer("up"), inputs=[1])
    small = ks.shrink(model)
    assert shapes(small) == {"stem": (3, 4), "twice/down": (4, 3), "twice/up": (3, 4), "tail/conv": (4, 5)}
    assert small.get_layer("twice").inputs[0].shape == (None, 8, 7, 4)
    assert_same(model, small)


@pytest.mark.parametrize(
    ("first", "second", "shape", "expected"),
    [
        (layers.Conv1D(6, 3), layers.Conv1D(5, 3, padding="causal"), (9, 3), 5),
        (layers.Conv3D(6, 2), layers.Conv3D(5, 2, padding="same"), (5, 4, 5, 3), 5),
        (layers.Conv2DTranspose(6, 3, strides=2), layers.Conv2DTranspose(5, 3), (5, 4, 3), 5),
        (layers.SeparableConv2D(6, 3), layers.SeparableConv2D(5, 3, padding="same", depth_multiplier=2), (7, 6, 3), 5),
        (layers.SeparableConv1D(6, 3), layers.SeparableConv1D(5, 2), (7, 3), 5),
        (layers.Dense(6), layers.Dense(5), (7, 3), 5),
    ],
    ids=lambda value: value.name if isinstance(value, layers.Layer) else "",
)
def test_kernels_of_every_kind(first, second, shape, expected):
    first, second = (type(layer).from_config(layer.get_config()) for layer in (first, second))
    model = sequential(first, layers.BatchNormalization(), layers.LeakyReLU(), second, shape=shape)

    def zero_inputs(layer, channel):
        weights = layer.get_weights()
        axis = -1 if "Transpose" in type(layer).__name__ else -2
        np.moveaxis(weights[0], axis, 0)[channel] = 0
        layer.set_weights(weights)

    zero_inputs(second, 4)
    small = ks.shrink(model)
    after = [keras.ops.shape(layer.weights[-1]) for layer in small.layers if layer.weights]
    assert after == [(expected,), (expected,), (5,)]
    assert small.count_params() < model.count_params()
    assert_same(model, small)


def test_zero_filters_of_separable_and_transposed_layers():
    model = sequential(
        layers.SeparableConv2D(6, 3, name="separable", activation="relu"),
        layers.Conv2DTranspose(7, 3, name="transposed", activation="relu"),
        layers.Conv2D(4, 3, padding="same", name="last"),
        shape=(8, 7, 3),
    )
    pointwise = values_of(model.get_layer("separable").pointwise_kernel)
    pointwise[..., 2] = 0
    model.get_layer("separable").pointwise_kernel.assign(pointwise)
    bias = values_of(model.get_layer("separable").bias)
    bias[2] = -1
    model.get_layer("separable").bias.assign(bias)
    kernel = np.asarray(model.get_layer("transposed").kernel)  # (height, width, outputs, inputs)
    kernel[:, :, 5] = 0
    model.get_layer("transposed").kernel.assign(kernel)
    bias = values_of(model.get_layer("transposed").bias)
    bias[5] = 0
    model.get_layer("transposed").bias.assign(bias)
    small = ks.shrink(model)
    assert small.get_layer("separable").pointwise_kernel.shape == (1, 1, 3, 5)
    assert small.get_layer("transposed").kernel.shape == (3, 3, 6, 5)
    assert small.get_layer("last").kernel.shape == (3, 3, 6, 4)
    assert_same(model, small)


# What stays whole.


@keras.saving.register_keras_serializable(package="tests")
class Mixing(layers.Layer):
    def call(self, inputs):
        return inputs + keras.ops.mean(inputs, axis=-1, keepdims=True)


class OwnConvolution(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel) + 1.0


@pytest.mark.parametrize(
    "between",
    [
        lambda x: layers.Conv2D(6, 3, groups=2, padding="same")(x),
        lambda x: layers.LayerNormalization()(x),
        lambda x: layers.GroupNormalization(2)(x),
        lambda x: layers.Softmax()(x),
        lambda x: layers.Activation("softmax")(x),
        lambda x: layers.Lambda(lambda t: t[..., ::-1])(x),
        lambda x: x * np.arange(1, 7, dtype="float32"),
        lambda x: layers.Rescaling([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])(x),
        lambda x: layers.Normalization(mean=[0.0] * 6, variance=[2.0] * 6)(x),
        lambda x: layers.Dropout(0.3, noise_shape=(None, 1, 1, 6))(x),
        lambda x: Mixing()(x),
        lambda x: OwnConvolution(6, 1)(x),
        lambda x: layers.TimeDistributed(layers.Dense(6))(x),
        lambda x: layers.Add()([x, keras.ops.mean(x, axis=-1, keepdims=True)]),
    ],
    ids=range(14),
)
def test_layers_whose_channels_cannot_be_told_apart_stay_whole(between):
    inputs = keras.Input((8, 5, 3))
    x = layers.Conv2D(6, 1, name="first", activation="relu")(inputs)
    model = filled(keras.Model(inputs, layers.Conv2D(4, 1, name="last")(between(x))))
    cut(model.get_layer("first"), outputs=[1], bias=-1.0)
    cut(model.get_layer("last"), inputs=[2])
    small = ks.shrink(model)
    assert shapes(small)["first"] == (3, 6)
    assert_same(model, small)


def test_lora_and_quantized_layers_stay_whole():
    for prepare in (lambda layer: layer.enable_lora(2), lambda layer: layer.quantize("int8")):
        model = sequential(layers.Dense(6, name="first"), layers.Dense(4, name="last"), shape=(5,))
        cut(model.get_layer("first"), outputs=[1], bias=0.0)
        prepare(model.get_layer("last"))
        small = ks.shrink(model)
        assert small.get_layer("first").units == 6
        assert_same(model, small)


@pytest.mark.parametrize(
    ("filters", "dead", "left"), [(48, 2, 48), (48, 17, 32), (48, 32, 16), (48, 40, 8), (40, 3, 37), (16, 1, 16)]
)
def test_a_multiple_of_channels_stays(filters, dead, left):
    model = sequential(
        layers.Conv2D(filters, 3, padding="same", name="a"),
        layers.BatchNormalization(),
        layers.Conv2D(5, 3, padding="same", name="b"),
    )
    cut(model.get_layer("b"), inputs=range(1, 1 + dead))
    small, removed = shrink_counted(model, multiple=16)
    assert shapes(small) == {"a": (3, left), "b": (left, 5)}
    gone = [filters - left, filters]
    assert removed == (
        {"a": {"inputs": [0, 3], "outputs": gone}, "b": {"inputs": gone, "outputs": [0, 5]}} if gone[0] else {}
    )
    assert_same(model, small)


def test_a_multiple_of_channels_stays_in_a_residual_stream():
    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(32, 3, padding="same", name="stem")(inputs)
    y = layers.Conv2D(32, 3, padding="same", name="branch")(x)
    model = filled(keras.Model(inputs, layers.Conv2D(4, 1, name="head")(layers.Add()([x, y]))))
    for name in ("branch", "head"):
        cut(model.get_layer(name), inputs=range(3, 12))
    assert shapes(shrink_counted(model)[0]) == {"stem": (3, 23), "branch": (23, 23), "head": (23, 4)}
    small, removed = shrink_counted(model, multiple=4)
    assert shapes(small) == {"stem": (3, 24), "branch": (24, 24), "head": (24, 4)} and removed["head"]["inputs"] == [
        8,
        32,
    ]
    assert_same(model, small)


def test_outputs_keep_their_channels():
    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(6, 3, name="features")(inputs)
    model = filled(keras.Model(inputs, {"features": x, "head": layers.Conv2D(4, 1, name="head")(x)}))
    cut(model.get_layer("features"), outputs=[1], bias=0.0)
    cut(model.get_layer("head"), outputs=[0], bias=0.0)
    small = ks.shrink(model)
    assert shapes(small) == shapes(model)
    assert_same(model, small)


def test_a_tensor_keeps_one_channel():
    inputs = keras.Input((8, 7, 3))
    x = layers.Conv2D(6, 3, padding="same", name="dead", activation="sigmoid")(inputs)
    x = layers.BatchNormalization()(x)
    y = layers.Conv2D(5, 3, padding="same", name="alive")(inputs)
    model = filled(keras.Model(inputs, layers.Conv2D(4, 3, name="head")(layers.Concatenate()([x, y]))))
    cut(model.get_layer("dead"), outputs=range(6), bias=0.2)
    small = ks.shrink(model)
    assert shapes(small) == {"dead": (3, 1), "alive": (3, 5), "head": (6, 4)}
    assert_same(model, small)
    assert shapes(ks.shrink(small)) == shapes(small)


def test_a_model_of_zeros_still_runs():
    model = sequential(layers.Conv2D(6, 3, name="a"), layers.Conv2D(5, 3, name="b"), layers.Conv2D(4, 1, name="c"))
    for layer in model.layers:
        layer.kernel.assign(np.zeros(layer.kernel.shape))
    small = ks.shrink(model)
    assert shapes(small) == {"a": (3, 1), "b": (1, 1), "c": (1, 4)}
    x = inputs_for(model)
    np.testing.assert_allclose(small(x), model(x), atol=1e-6)


# Kinds of models.


def test_models_of_every_shape(model, inputs_of):
    """Those of the room's other tests: many inputs, dictionaries, text, wrappers, nested and shared layers."""
    rng = np.random.default_rng(2)
    for layer in selection.flatten_layers(model).values():
        variable = kernel_of(layer)
        if variable is not None and type(layer) in (layers.Conv2D, layers.Dense):
            kernel = keras.ops.convert_to_numpy(variable).copy()
            kernel[..., rng.random(kernel.shape[-1]) < 0.4] = 0
            kernel[..., rng.random(kernel.shape[-2]) < 0.3, :] = 0
            variable.assign(kernel)
    small, x = ks.shrink(model), inputs_of(model)
    half = "low" in model.name
    for before, after in zip(keras.tree.flatten(model(x)), keras.tree.flatten(small(x)), strict=True):
        before, after = np.asarray(before, "float32"), np.asarray(after, "float32")
        np.testing.assert_allclose(after, before, atol=(2e-2 if half else 2e-5) * max(np.abs(before).max(), 1e-3))


@pytest.mark.parametrize(
    ("policy", "tolerance"), [("float32", 2e-5), ("mixed_float16", 1e-2), ("float16", 1e-2), ("mixed_bfloat16", 5e-2)]
)
def test_data_types(policy, tolerance):
    keras.config.set_dtype_policy(policy)
    model = sequential(
        layers.Conv2D(8, 3, name="first", activation="sigmoid"),
        layers.BatchNormalization(),
        layers.Conv2D(6, 3, name="second"),
    )
    cut(model.get_layer("first"), outputs=[0, 1], bias=0.3)
    cut(model.get_layer("second"), inputs=[5])
    small = ks.shrink(model)
    assert shapes(small) == {"first": (3, 5), "second": (5, 6)}
    assert small.get_layer("second").dtype_policy.name == policy
    assert_same(model, small, tolerance)


def test_channels_first(channels_first_on_cpu):
    model = sequential(
        layers.Conv2D(8, 3, name="first", activation="relu", data_format="channels_first"),
        layers.BatchNormalization(axis=1),
        layers.Conv2D(6, 3, name="second", padding="same", data_format="channels_first"),
        layers.Flatten(data_format="channels_first"),
        layers.Dense(3, name="dense"),
        shape=(3, 8, 7),
    )
    cut(model.get_layer("second"), inputs=[5], outputs=[1, 2], bias=0.0)
    small = ks.shrink(model)
    assert shapes(small) == {"first": (3, 7), "second": (7, 4), "dense": (4 * 30, 3)}
    assert_same(model, small)
    # Keras adds the bias of five channels to five columns. One channel of zeros stays, so that there are six.
    filled(model)
    cut(model.get_layer("second"), outputs=[1], bias=0.0)
    small = ks.shrink(model)
    assert shapes(small)["second"] == (8, 6)
    assert_same(model, small)


@pytest.mark.parametrize("open_size", [4, 9])
def test_open_sizes(open_size):
    model = sequential(
        layers.Conv2D(6, 3, padding="same", name="a", activation="sigmoid"),
        layers.MaxPooling2D(2),
        layers.Conv2D(5, 3, padding="same", name="b"),
        layers.Conv2D(4, 1, padding="same", name="c"),
        layers.GlobalAveragePooling2D(),
        shape=(None, None, 3),
    )
    cut(model.get_layer("a"), outputs=[1], bias=0.0)  # a constant of .5, in a "same" padding
    cut(model.get_layer("b"), inputs=[2], outputs=[0, 3], bias=0.4)
    small = ks.shrink(model)
    assert shapes(small) == {"a": (3, 5), "b": (5, 3), "c": (3, 4)}
    assert_same(model, small, open_size=open_size)


def test_the_model_is_left_as_it_was_and_the_result_trains(tmp_path):
    model = ks.sparsify(
        sequential(layers.Conv2D(4, 3, name="a"), layers.GlobalMaxPooling2D(), layers.Dense(2, name="b"))
    )
    model.get_layer("a").assign_mask(np.ones((1, 1, 3, 4)) * (np.arange(4) != 2))
    model.get_layer("a").bias.assign([1.0, 1.0, 0.0, 1.0])
    model.compile("adam", "mse")
    before = model.get_weights()
    small = ks.shrink(model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert shapes(small) == {"a": (3, 3), "b": (3, 2)}
    x, y = inputs_for(small, 8), np.random.default_rng(0).normal(size=(8, 2))
    assert np.isfinite(small.fit(x, y, epochs=2, verbose=0).history["loss"][-1])
    small.save(tmp_path / "small.keras")
    assert_same(small, keras.saving.load_model(tmp_path / "small.keras"))


# Networks of all kinds of layers, at random.


def random_network(seed):
    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    def activation():
        return pick(None, None, "relu", "sigmoid", "tanh", "leaky_relu", "elu")

    def same(x, filters=None):
        options = {"padding": "same", "activation": activation(), "use_bias": bool(rng.random() < 0.6)}
        return layers.Conv2D(filters or x.shape[-1], pick(1, 3, (3, 1)), **options)(x)

    def any_convolution(x):
        options = {"padding": pick("same", "valid"), "strides": pick(1, 1, 2), "activation": activation()}
        return layers.Conv2D(int(pick(4, 6, 8)), pick(1, 3, (1, 3), (3, 2)), **options)(x)

    def dense_block(x):
        return layers.Concatenate()([x, same(layers.ReLU()(layers.BatchNormalization()(x)), 4)])

    def gated(x):
        gate = layers.Dense(4, activation="relu")(layers.GlobalAveragePooling2D(keepdims=True)(x))
        return layers.Multiply()([x, layers.Dense(x.shape[-1], activation="sigmoid")(gate)])

    def nested(x):
        inside = keras.Input(x.shape[1:])
        block = keras.Model(inside, layers.BatchNormalization()(same(inside)))
        return block(layers.ReLU()(block(x)))

    def shared(x):
        layer = layers.Conv2D(x.shape[-1], 3, padding="same", activation=activation())
        return layer(layers.ReLU()(layer(x)))

    def transposed(x):
        return layers.Conv2DTranspose(5, 3, strides=pick(1, 2), padding=pick("same", "valid"))(x)

    def depthwise(x):
        options = {"padding": pick("same", "valid"), "depth_multiplier": int(pick(1, 2)), "activation": activation()}
        return layers.DepthwiseConv2D(3, **options)(x)

    def separable(x):
        return layers.SeparableConv2D(6, 3, padding=pick("same", "valid"), depth_multiplier=int(pick(1, 2)))(x)

    def single(x):
        return pick(
            layers.BatchNormalization(),
            layers.Activation("sigmoid"),
            layers.LeakyReLU(),
            layers.PReLU(shared_axes=[1, 2]),
            layers.Dropout(0.3),
            layers.MaxPooling2D(2, padding="same"),
            layers.AveragePooling2D(3, 1, padding="same"),
            layers.ZeroPadding2D(1),
        )(x)

    steps = (
        any_convolution,
        any_convolution,
        lambda x: layers.Add()([x, same(x)]),
        lambda x: layers.Maximum()([x, same(x)]),
        lambda x: keras.ops.relu(x) * 2.0 - 0.5,
        *(single, single, dense_block, gated, nested, shared, transposed, depthwise, separable),
    )
    inputs = keras.Input((int(pick(9, 12)), int(pick(8, 11)), 3))
    x = layers.Conv2D(8, 3, activation=activation())(inputs)
    for _ in range(6):
        x = pick(*steps)(x) if min(x.shape[1:3]) >= 4 else same(x)
    x = pick(layers.Flatten(), layers.GlobalAveragePooling2D(), layers.GlobalMaxPooling2D())(x)
    model = filled(keras.Model(inputs, [layers.Dense(3)(x), layers.Dense(4, activation="softmax")(x)]), seed)
    for layer in selection.flatten_layers(model).values():
        for name in ("_kernel", "kernel", "pointwise_kernel"):
            variable = vars(layer).get(name)
            if variable is not None:
                kernel = keras.ops.convert_to_numpy(variable).copy()
                kernel *= rng.random(kernel.shape) < 0.9
                kernel *= (rng.random((kernel.shape[-2], 1)) < 0.9) & (rng.random(kernel.shape[-1]) < 0.8)
                variable.assign(kernel)
        for name in ("bias", "beta", "moving_mean"):
            variable = getattr(layer, name, None)
            if variable is not None:
                variable.assign(keras.ops.convert_to_numpy(variable) * (rng.random(variable.shape) < 0.5))
    return model


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5, 6, 7, 8])
def test_random_networks(seed):
    model = random_network(seed)
    small = ks.shrink(model)
    assert_same(model, small)
    assert ks.shrink(small).count_params() == small.count_params()  # nothing is left to remove
