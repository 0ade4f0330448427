"""SparseConv2D: Keras's Conv2D at density 1, a convolution with `kernel * mask` below."""

import inspect
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks

GRANULARITIES = ks.granularity.names()
SHAPE = (2, 7, 9, 4)


def seeded(kind="normal"):
    initializers = keras.initializers
    return {
        "normal": initializers.RandomNormal(0.0, 0.5, seed=3),
        "glorot": initializers.GlorotUniform(seed=5),
        "he": initializers.HeNormal(seed=7),
        "truncated": initializers.TruncatedNormal(stddev=0.3, seed=11),
    }[kind]


def twins(granularity="connection", filters=6, kernel_size=3, **options):
    options = {"kernel_initializer": seeded(), "bias_initializer": seeded("truncated"), **options}

    def fresh():  # initializers, regularizers and constraints must not be shared
        return {
            key: value.__class__.from_config(value.get_config())
            if isinstance(value, (keras.Initializer, keras.Regularizer, keras.constraints.Constraint))
            else value
            for key, value in options.items()
        }

    sparse = ks.layers.SparseConv2D(filters, kernel_size, granularity=granularity, name="twin", **fresh())
    return sparse, keras.layers.Conv2D(filters, kernel_size, name="twin", **fresh())


def inputs(shape=SHAPE):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def test_signature_is_that_of_conv2d_and_keyword_only_extras():
    ours = list(inspect.signature(ks.layers.SparseConv2D.__init__).parameters.values())
    theirs = list(inspect.signature(keras.layers.Conv2D.__init__).parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert [(p.name, p.default) for p in ours if p.kind is keyword] == [
        ("granularity", "connection"),
        ("mask_initializer", "ones"),
    ]
    assert [(p.name, p.default, p.kind) for p in ours if p.kind is not keyword] == [
        (p.name, p.default, p.kind) for p in theirs
    ]


# Arguments that change the geometry are crossed; the others ride along in turn, so that each meets many geometries.
# Grouped convolutions go through XLA on a CPU, at a compilation each, and have their own table.
GEOMETRIES = [
    {"strides": strides, "padding": padding, "dilation_rate": dilation, "kernel_size": kernel}
    for strides, padding, dilation, kernel in itertools.product(
        (1, 2, (2, 1)), ("valid", "same", "VALID", "Same"), (1, 2, (1, 2)), (1, 3, (2, 3), (1, 4))
    )
    if strides == 1 or dilation == 1
]
RIDERS = [
    {"use_bias": bias, "activation": activation, "granularity": granularity}
    for bias, activation, granularity in itertools.product(
        (True, False), (None, "relu", "tanh", keras.activations.gelu), GRANULARITIES
    )
]


@pytest.mark.parametrize(
    "options",
    [{**geometry, **RIDERS[i % len(RIDERS)]} for i, geometry in enumerate(GEOMETRIES)],
    ids=lambda options: "-".join(getattr(o, "__name__", str(o)) for o in options.values()),
)
def test_geometry(options, assert_twins):
    assert_twins(*twins(**options), inputs())


def test_every_rider_rides():
    assert len(GEOMETRIES) >= len(RIDERS)


OTHERS = [
    {"groups": 2},
    {"groups": 2, "strides": 2, "padding": "same", "granularity": "weight"},
    {"groups": 2, "dilation_rate": 2, "granularity": "feature_map", "use_bias": False},
    {"groups": 4, "filters": 8, "granularity": "group"},
    {"groups": 4, "filters": 4, "kernel_size": 1, "granularity": "channel"},
    {"kernel_initializer": seeded("glorot"), "bias_initializer": "ones"},
    {"kernel_initializer": seeded("he"), "bias_initializer": "zeros"},
    {"kernel_initializer": keras.initializers.Constant(0.25)},
    {"kernel_regularizer": keras.regularizers.L1(0.01), "bias_regularizer": keras.regularizers.L2()},
    {"kernel_regularizer": keras.regularizers.L2(0.1), "granularity": "group"},
    {"kernel_regularizer": keras.regularizers.L1L2(0.1, 0.2), "granularity": "weight"},
    {"kernel_regularizer": "l2"},
    {"activity_regularizer": keras.regularizers.L2(0.01)},
    {"kernel_constraint": keras.constraints.MaxNorm(0.5, axis=[0, 1, 2])},
    {"kernel_constraint": keras.constraints.NonNeg(), "bias_constraint": keras.constraints.NonNeg()},
    {"kernel_constraint": keras.constraints.UnitNorm(axis=[0, 1, 2]), "granularity": "weight"},
    {"trainable": False},
    *({"dtype": dtype} for dtype in ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16")),
    {"dtype": keras.DTypePolicy("mixed_float16"), "granularity": "weight", "activation": "relu"},
    {"dtype": "mixed_bfloat16", "granularity": "group", "kernel_regularizer": "l2"},
]


@pytest.mark.parametrize("options", OTHERS)
def test_other_arguments(options, assert_twins):
    sparse, dense = twins(**options)
    x = inputs()
    if options.get("trainable") is False:
        sparse.build(x.shape), dense.build(x.shape)
        assert sparse.trainable_weights == dense.trainable_weights == []
        np.testing.assert_array_equal(sparse(x), dense(x))
        assert sparse.get_config()["trainable"] is False
    else:
        assert_twins(sparse, dense, x.astype(sparse.compute_dtype))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_channels_first(granularity, padding, conv2d_oracle, random_mask):
    options = {"data_format": "channels_first", "padding": padding, "strides": (1, 2)}
    sparse, dense = twins(granularity, kernel_size=(2, 3), **options)
    shape = (None, 4, 7, 9)
    sparse.build(shape), dense.build(shape)
    assert sparse.mask.shape == sparse.granularity.mask_shape((2, 3, 4, 6))
    assert sparse.compute_output_shape(shape) == dense.compute_output_shape(shape)
    config = {**sparse.get_config()}
    del config["granularity"], config["mask_initializer"]
    assert config == dense.get_config()
    sparse.mask.assign(random_mask(sparse.mask.shape, 0.5))
    x = inputs()
    expected = conv2d_oracle(x, sparse.kernel, (1, 2), padding) + np.asarray(sparse.bias)
    try:
        y = sparse(x.transpose(0, 3, 1, 2))
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError):
        pytest.skip("this TensorFlow has no channels_first convolution on a CPU")
    np.testing.assert_allclose(np.transpose(y, (0, 2, 3, 1)), expected, rtol=1e-5, atol=1e-5)


def test_default_data_format_is_that_of_the_configuration():
    keras.config.set_image_data_format("channels_first")
    try:
        layer = ks.layers.SparseConv2D(3, 2)
    finally:
        keras.config.set_image_data_format("channels_last")
    layer.build((None, 5, 6, 7))
    assert layer.data_format == "channels_first" and layer.mask.shape == (1, 1, 5, 3)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"filters": 0}, SHAPE),
        ({"filters": 5, "groups": 2}, SHAPE),
        ({"groups": 0}, SHAPE),
        ({"filters": 6, "groups": 3}, SHAPE),
        ({"kernel_size": 0}, SHAPE),
        ({"kernel_size": (1, 2, 3)}, SHAPE),
        ({"kernel_size": (8, 1)}, SHAPE),
        ({"strides": 0}, SHAPE),
        ({"strides": 2, "dilation_rate": 2}, SHAPE),
        ({"padding": "full"}, SHAPE),
        ({"padding": "causal"}, SHAPE),
        ({"data_format": "channels_middle"}, SHAPE),
        ({"activation": "no such"}, SHAPE),
        ({"kernel_initializer": "no such"}, SHAPE),
        ({"no_such_argument": 1}, SHAPE),
        ({"lora_rank": 2, "kernel_constraint": "non_neg"}, SHAPE),
    ],
    ids=str,
)
def test_wrong_arguments_raise_what_conv2d_raises(options, shape):
    errors = []
    for cls in (keras.layers.Conv2D, ks.layers.SparseConv2D):
        try:
            cls(**{"filters": 4, "kernel_size": 3, **options}).build(shape)
        except Exception as error:
            message = str(error).replace("SparseConv2D", "Conv2D").replace("sparse_", "")
            errors.append((type(error), message))
    if not errors:
        pytest.skip("this Keras takes it")
    assert len(errors) == 2 and errors[0] == errors[1]


@pytest.mark.parametrize("shape", [(2, 7, 9), (2, 7, 9, 5), (2, 2, 2, 4)], ids=str)
def test_wrong_inputs_raise_what_conv2d_raises(shape):
    errors = []
    for layer in twins():
        layer.build(SHAPE)
        with pytest.raises(Exception) as caught:
            layer(inputs(shape))
        errors.append(caught.type)
    assert errors[0] is errors[1]


MASKED = [
    {},
    {"padding": "same", "strides": 2},
    {"dilation_rate": (2, 1), "kernel_size": (3, 2)},
    {"kernel_size": 1, "filters": 7},
]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", MASKED, ids=str)
def test_masked_output_is_that_of_the_oracle(options, granularity, sparsity, conv2d_oracle, random_mask):
    layer, _ = twins(granularity, **options)
    layer.build(SHAPE)
    mask = random_mask(layer.mask.shape, sparsity)
    layer.mask.assign(mask)
    kernel = np.asarray(layer._kernel, "float64") * mask
    assert not np.asarray(layer.kernel)[np.broadcast_to(mask, kernel.shape) == 0].any()
    np.testing.assert_array_equal(layer.kernel, kernel)
    x = inputs()
    expected = conv2d_oracle(x, kernel, layer.strides, layer.padding, layer.dilation_rate) + np.asarray(
        layer.bias, "float64"
    )
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_masked_grouped_convolution(granularity, conv2d_oracle, random_mask):
    layer, _ = twins(granularity, groups=2, padding="same")
    layer.build(SHAPE)
    assert layer.mask.shape == layer.granularity.mask_shape((3, 3, 2, 6))
    layer.mask.assign(random_mask(layer.mask.shape, 0.5))
    x = inputs()
    expected = conv2d_oracle(x, layer.kernel, padding="same", groups=2) + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_masked_low_precision(dtype, conv2d_oracle, random_mask):
    layer, _ = twins("weight", dtype=dtype)
    layer.build(SHAPE)
    layer.mask.assign(random_mask(layer.mask.shape, 0.5))
    assert layer.mask.dtype == layer.kernel.dtype == layer.variable_dtype
    x = inputs()
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    expected = conv2d_oracle(x, np.asarray(layer.kernel, "float64")) + np.asarray(layer.bias, "float64")
    epsilon = 2.0**-10 if "float16" in dtype and "b" not in dtype else 2.0**-7
    np.testing.assert_allclose(np.asarray(y, "float64"), expected, rtol=8 * epsilon, atol=8 * epsilon)


@pytest.mark.parametrize("sparsity", [0.5, 1.0])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_of_masked_weights_are_zero_and_the_others_those_of_conv2d(granularity, sparsity, random_mask):
    sparse, dense = twins(granularity)
    sparse.build(SHAPE), dense.build(SHAPE)
    mask = random_mask(sparse.mask.shape, sparsity)
    sparse.mask.assign(mask)
    dense.kernel.assign(sparse.kernel)
    found = []
    for layer in (sparse, dense):
        x = tf.constant(inputs())
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x) ** 2)
        found.append(tape.gradient(loss, [layer._kernel.value, layer.bias.value, x]))
    kernel = np.asarray(found[0][0])
    assert not kernel[np.broadcast_to(mask, kernel.shape) == 0].any()
    np.testing.assert_allclose(kernel, found[1][0] * mask, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[0][1:], found[1][1:]):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_custom_granularity(conv2d_oracle):
    taps = ks.granularity.Granularity("taps", taps=True, inputs=False, outputs=False)
    layer, _ = twins(taps)
    layer.build(SHAPE)
    assert layer.mask.shape == (3, 3, 1, 1)
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], "float32").reshape(3, 3, 1, 1)
    layer.mask.assign(cross)
    expected = conv2d_oracle(inputs(), np.asarray(layer._kernel) * cross) + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(inputs()), expected, rtol=1e-5, atol=1e-5)


def test_lora_is_masked(conv2d_oracle, random_mask):
    layer, _ = twins("weight", lora_rank=2)
    layer.build(SHAPE)
    layer.lora_kernel_b.assign(np.random.default_rng(2).normal(size=layer.lora_kernel_b.shape))
    mask = random_mask(layer.mask.shape, 0.5)
    layer.mask.assign(mask)
    update = np.asarray(layer.lora_kernel_a, "float64") @ np.asarray(layer.lora_kernel_b)
    kernel = (np.asarray(layer._kernel, "float64") + update) * mask  # alpha defaults to the rank
    np.testing.assert_allclose(layer.kernel, kernel, rtol=1e-5, atol=1e-6)
    expected = conv2d_oracle(inputs(), kernel) + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(inputs()), expected, rtol=1e-4, atol=1e-4)
