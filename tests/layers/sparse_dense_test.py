"""SparseDense: Keras's Dense at density 1, a product with `kernel * mask` below."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks

GRANULARITIES = ks.granularity.names()
RANKS = [(3, 5), (2, 4, 5), (2, 3, 1, 5)]
MASK_SHAPES = {
    "weight": (5, 7),
    "connection": (5, 7),
    "group": (5, 1),
    "channel": (5, 1),
    "feature_map": (1, 7),
}


def twins(granularity="weight", units=7, **options):
    options = {"kernel_initializer": "normal", "bias_initializer": "normal", **options}
    made = []
    for cls, extra in (
        (ks.layers.SparseDense, {"granularity": granularity}),
        (keras.layers.Dense, {}),
    ):
        seeded = {
            key: keras.initializers.RandomNormal(stddev=0.5, seed=len(key)) if value == "normal" else value
            for key, value in options.items()
        }
        made.append(cls(units, name="twin", **seeded, **extra))
    return made


def inputs(shape=RANKS[0]):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def test_signature_is_that_of_dense_and_keyword_only_extras():
    ours = list(inspect.signature(ks.layers.SparseDense.__init__).parameters.values())
    theirs = list(inspect.signature(keras.layers.Dense.__init__).parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert [(p.name, p.default) for p in ours if p.kind is keyword] == [
        ("granularity", "weight"),
        ("mask_initializer", "ones"),
    ]
    known = {p.name for p in theirs}
    assert [
        (p.name, p.default, p.kind)
        for p in ours
        # Older Keras 3 does not know this one.
        if p.kind is not keyword and (p.name in known or p.name != "quantization_config")
    ] == [(p.name, p.default, p.kind) for p in theirs]


@pytest.mark.parametrize("shape", RANKS, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_ranks(shape, granularity, use_bias, assert_twins):
    assert_twins(*twins(granularity, use_bias=use_bias, activation="tanh"), inputs(shape))


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"activation": keras.activations.gelu, "units": 1},
        {"kernel_initializer": keras.initializers.Orthogonal(seed=3)},
        {"bias_initializer": "ones"},
        {"kernel_regularizer": "l1", "bias_regularizer": "l2"},
        {"kernel_regularizer": keras.regularizers.OrthogonalRegularizer(0.1), "granularity": "group"},
        {"activity_regularizer": "l2"},
        {"kernel_constraint": "max_norm", "bias_constraint": "non_neg"},
        {"kernel_constraint": "unit_norm", "granularity": "feature_map"},
        *({"dtype": d} for d in ("mixed_bfloat16", "mixed_float16", "bfloat16", "float64")),
    ],
)
def test_other_arguments(options, assert_twins):
    sparse, dense = twins(**options)
    assert_twins(sparse, dense, inputs().astype(sparse.compute_dtype))


@pytest.mark.parametrize("options", [{"units": 0}, {"units": 2.0}, {"activation": "no such"}], ids=str)
def test_wrong_arguments_raise_what_dense_raises(options):
    errors = []
    for cls in (keras.layers.Dense, ks.layers.SparseDense):
        try:
            cls(**{"units": 4, **options})
        except Exception as error:
            errors.append((type(error), str(error)))
    if not errors:
        pytest.skip("this Keras takes it")
    assert len(errors) == 2 and errors[0] == errors[1]


def test_unknown_size_raises_what_dense_raises():
    errors = []
    for layer in twins():
        with pytest.raises(ValueError) as caught:
            layer.build((None, None))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", RANKS, ids=str)
def test_masked_output_is_that_of_the_oracle(shape, granularity, sparsity, random_mask):
    layer, _ = twins(granularity)
    layer.build(shape)
    assert layer.mask.shape == MASK_SHAPES[granularity]
    mask = random_mask(layer.mask.shape, sparsity)
    layer.mask.assign(mask)
    kernel = np.asarray(layer._kernel, "float64") * mask
    np.testing.assert_array_equal(layer.kernel, kernel)
    x = inputs(shape)
    expected = x.astype("float64") @ kernel + np.asarray(layer.bias, "float64")
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_of_masked_weights_are_zero(granularity, random_mask):
    layer, _ = twins(granularity)
    layer.build(RANKS[0])
    mask = random_mask(layer.mask.shape, 0.5)
    layer.mask.assign(mask)
    x = inputs()
    with tf.GradientTape() as tape:
        y = layer(x)
        loss = tf.reduce_sum(y**2)
    gradient = tape.gradient(loss, layer._kernel.value)
    np.testing.assert_allclose(gradient, x.T @ (2 * y.numpy()) * mask, rtol=1e-5, atol=1e-5)
    assert not np.asarray(gradient)[np.broadcast_to(mask, gradient.shape) == 0].any()


@pytest.mark.parametrize("when", ["constructor", "enable_lora"])
def test_lora_is_masked_trains_and_merges_on_saving(when, random_mask):
    layer, dense = twins(lora_rank=2, lora_alpha=2) if when == "constructor" else twins()
    for twin in (layer, dense):
        twin.build(RANKS[0])
        if when == "enable_lora":
            twin.enable_lora(2)
        twin.lora_kernel_a.assign(np.random.default_rng(4).normal(size=(5, 2)))
        twin.lora_kernel_b.assign(np.random.default_rng(5).normal(size=(2, 7)))
    x = inputs()
    np.testing.assert_array_equal(layer(x), dense(x))
    mask = random_mask(layer.mask.shape, 0.5)
    layer.mask.assign(mask)
    np.testing.assert_array_equal(layer.kernel, dense.kernel * mask)
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(keras.optimizers.AdamW(0.1), "mse")
    model.train_on_batch(x, np.ones((3, 7)))
    assert not np.asarray(layer.kernel)[mask == 0].any()
    assert {v.name for v in layer.trainable_variables} == {"bias", "lora_kernel_a", "lora_kernel_b"}
    store = {}
    layer.save_own_variables(store)
    assert not np.asarray(store["0"])[mask == 0].any()
    plain = ks.layers.SparseDense(7)
    plain.build(RANKS[0])
    plain.load_own_variables(store)
    np.testing.assert_allclose(plain(x), layer(x), rtol=1e-6)


@pytest.mark.parametrize("policy", ["int8_from_float32", "float8_from_float32"])
def test_quantized_policies_are_refused(policy):
    # Keras's quantized computations read the raw kernel, past the mask.
    with pytest.raises(ValueError, match="`dtype` must be a policy without quantization"):
        ks.layers.SparseDense(3, dtype=policy)


def test_quantize_says_what_to_do():
    layer, _ = twins()
    layer.build(RANKS[0])
    for options in ({}, {"type_check": False}):
        with pytest.raises(NotImplementedError, match="strip"):
            layer.quantize("int8", **options)
    model = keras.Sequential([keras.Input((5,)), layer])
    with pytest.warns(UserWarning, match="strip"):
        model.quantize("int8")
    assert layer.dtype_policy.name == "float32"
