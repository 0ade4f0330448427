# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""Bias, residual and activation: outputs and gradients of the fused ops, and of the reference."""

import itertools
from functools import partial

import numpy as np
import oracle
import pytest
import tensorflow as tf

from keras_sparse import ops

# (batch, height, width, in_channels, out_channels, kernel, strides, padding)
CASES = [
    (2, 9, 10, 5, 19, (3, 3), (1, 1), "same"),
    (3, 6, 7, 17, 35, (1, 1), (1, 1), "valid"),
    (2, 9, 8, 4, 16, (3, 3), (2, 2), ((1, 0), (2, 1))),
    (2, 7, 9, 40, 33, (7, 1), (1, 1), "same"),
]
OPS = ["connection", "thinned"]
CHOICES = list(itertools.product([False, True], [False, True], [None, "linear", "relu", "relu6"]))


def finish(outputs, bias, residual, activation):
    outputs = outputs + (0 if bias is None else bias) + (0 if residual is None else residual)
    low, high = {"relu": (0, np.inf), "relu6": (0, 6)}.get(activation, (-np.inf, np.inf))
    return np.clip(outputs, low, high)


def problem(op, case=0, density=0.5):
    """Returns (inputs, dense kernel, filter, bias, residual) and `convolve(module)`, the op on inputs and filters."""
    batch, height, width, ci, co, kernel_size, strides, padding = CASES[case]
    generator = oracle.rng(31, case)
    inputs = generator.standard_normal((batch, height, width, ci)).astype(np.float32)
    options = dict(strides=strides, padding=padding)
    if op == "connection":
        kernel, filter, *table = oracle.connection_table(generator, density, kernel_size, ci, co)
    else:
        kernel, filter, *table = oracle.thinned_filter(generator, density, kernel_size, ci, co)
        table.append(kernel_size)
    shape = oracle.conv2d(inputs, kernel, strides, padding).shape
    bias = generator.normal(1, 3, co).astype(np.float32)
    residual = generator.normal(1, 3, shape).astype(np.float32)

    def convolve(module):
        function = getattr(module, f"{op}_conv2d")
        return lambda x, w, **epilogue: function(x, w, *table, **options, **epilogue)

    return (inputs, kernel, filter, bias, residual), convolve


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("path", ["op", "reference"])
def test_outputs(path, op, case):
    (inputs, kernel, filter, bias, residual), convolve = problem(op, case)
    function = convolve(ops if path == "op" else ops.reference)
    product = oracle.conv2d(inputs, kernel, *CASES[case][6:])
    for with_bias, with_residual, activation in CHOICES:
        b, r = bias if with_bias else None, residual if with_residual else None
        actual = function(inputs, filter, bias=b, residual=r, activation=activation)
        oracle.assert_close(actual, finish(product, b, r, activation), kernel.size // kernel.shape[-1])


def pooled(outputs, size):
    """The largest of each square; rows and columns at the end that fill no square are left out."""
    batch, height, width, channels = outputs.shape
    whole = np.asarray(outputs)[:, : height // size * size, : width // size * size]
    return whole.reshape(batch, height // size, size, width // size, size, channels).max(axis=(2, 4))


# (batch, height, width, in_channels, out_channels, kernel, strides, padding), density, pool size
POOLED = [
    ((2, 8, 12, 17, 35, (3, 3), (1, 1), "same"), 0.1, 2),
    ((3, 32, 32, 16, 16, (3, 3), (1, 1), "same"), 0.5, 2),
    ((2, 14, 10, 64, 33, (3, 3), (1, 1), ((1, 1), (1, 1))), 0.9, 2),
    ((2, 12, 12, 6, 7, (5, 5), (1, 1), "valid"), 1.0, 2),
    ((2, 8, 22, 4, 9, (7, 1), (1, 1), "same"), 0.5, 2),
    ((2, 9, 11, 17, 35, (3, 3), (1, 1), "same"), 0.5, 2),  # of an odd size
    ((2, 9, 12, 5, 19, (1, 1), (1, 1), "valid"), 0.5, 3),
    ((2, 15, 13, 5, 19, (3, 3), (2, 2), "same"), 0.5, 2),
    ((5, 2, 2, 70, 33, (3, 3), (1, 1), "same"), 0.3, 2),
    ((2, 3, 3, 5, 6, (3, 3), (1, 1), "same"), 0.0, 2),
]


@pytest.mark.parametrize("case", range(len(POOLED)))
@pytest.mark.parametrize("path", ["op", "reference"])
def test_pooled_outputs(path, case):
    (batch, height, width, ci, co, kernel_size, strides, padding), density, pool_size = POOLED[case]
    generator = oracle.rng(32, case)
    inputs = generator.standard_normal((batch, height, width, ci)).astype(np.float32)
    kernel, *table = oracle.connection_table(generator, density, kernel_size, ci, co)
    bias = generator.normal(1, 3, co).astype(np.float32)
    function = (ops if path == "op" else ops.reference).connection_conv2d
    product = oracle.conv2d(inputs, kernel, strides, padding)
    for with_bias, _, activation in CHOICES[::2]:
        b = bias if with_bias else None
        actual = function(
            inputs, *table, strides=strides, padding=padding, bias=b, activation=activation, pool_size=pool_size
        )
        oracle.assert_close(actual, pooled(finish(product, b, None, activation), pool_size), kernel.size // co)


def test_images_smaller_than_a_square_leave_nothing():
    (inputs, _, filter, bias, _), convolve = problem("connection")
    assert convolve(ops)(inputs, filter, bias=bias, pool_size=10).shape == (2, 0, 1, 19)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize(("case", "pool_size"), [(0, 2), (1, 3), (2, 1), (3, 2)])
def test_pooled_gradients(case, pool_size, activation):
    (inputs, _, filter, bias, _), convolve = problem("connection", case)
    functions = [partial(convolve(module), pool_size=pool_size) for module in (ops, ops.reference)]
    for more in ({}, {"bias": bias}):
        actual, expected = (gradients_of(function, inputs, filter, activation, **more) for function in functions)
        for a, b in zip(actual, expected, strict=True):
            size = max(1.0, float(tf.reduce_max(tf.abs(b))))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * size)


def test_pooled_second_order():
    (inputs, _, filter, bias, _), convolve = problem("connection")
    values = [tf.constant(value) for value in (inputs, filter, bias)]

    def second(function):
        with tf.GradientTape() as outer:
            outer.watch(values)
            with tf.GradientTape() as inner:
                inner.watch(values)
                outputs = function(*values[:2], bias=values[2], activation="relu", pool_size=2)
                loss = tf.reduce_sum(outputs**3)
            first = inner.gradient(loss, values)
            loss = tf.add_n([tf.reduce_sum(tf.sin(0.01 * g)) for g in first])
        return outer.gradient(loss, values)

    for actual, expected in zip(second(convolve(ops)), second(convolve(ops.reference)), strict=True):
        size = float(tf.reduce_max(tf.abs(expected)))
        assert size > 0.01
        np.testing.assert_allclose(actual, expected, atol=1e-4 * size)


def test_pooling_in_graphs_of_unknown_shapes():
    (inputs, kernel, filter, bias, _), convolve = problem("connection")

    @tf.function(input_signature=[tf.TensorSpec([None] * 4), tf.TensorSpec([None])])
    def graph(x, b):
        outputs = convolve(ops)(x, filter, bias=b, activation="relu", pool_size=2)
        return outputs, tf.gradients(outputs, [x, b])

    @tf.function(input_signature=[tf.TensorSpec([None, 9, None, 5])])
    def half_known(x):
        outputs = convolve(ops)(x, filter, pool_size=2)
        assert outputs.shape.as_list() == [None, 4, None, 19]
        return outputs

    outputs, gradients = graph(inputs, bias)
    product = oracle.conv2d(inputs, kernel, padding="same")
    oracle.assert_close(outputs, pooled(finish(product, bias, None, "relu"), 2), 45)
    assert [g.shape for g in gradients] == [inputs.shape, bias.shape]
    oracle.assert_close(half_known(inputs), pooled(product, 2), 45)
    # The plan is made for one pool size and batch; another batch plans again.
    oracle.assert_close(half_known(inputs[:1]), pooled(product[:1], 2), 45)


def test_pooling_apart_is_that_of_tensorflow():
    (inputs, _, filter, bias, _), convolve = problem("connection", 1)
    whole = convolve(ops)(inputs, filter, bias=bias, activation="relu")
    # No routine pools one tap itself: the same convolution, and then the largest of its values.
    apart = convolve(ops)(inputs, filter, bias=bias, activation="relu", pool_size=3)
    np.testing.assert_array_equal(apart, tf.nn.max_pool2d(whole, 3, 3, "VALID"))


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "`pool_size` must be an integer, received 2.0", {"pool_size": 2.0}),
        (ValueError, r"`pool_size` must be between 1 and 2\*\*31 - 1, received 0", {"pool_size": 0}),
        (ValueError, "`pool_size` must be 1 where there is a `residual`, received 2", {"pool_size": 2, "residual": 0}),
    ],
)
def test_wrong_pool_sizes(error, match, options):
    (inputs, _, filter, _, residual), convolve = problem("connection")
    with pytest.raises(error, match=match):
        convolve(ops)(inputs, filter, **{**options, **({"residual": residual} if "residual" in options else {})})


@pytest.mark.parametrize("op", OPS)
def test_not_a_number_passes_as_in_tensorflow(op):
    (inputs, _, filter, bias, residual), convolve = problem(op)
    for activation, expected in (("relu", tf.nn.relu), ("relu6", tf.nn.relu6)):
        actual = convolve(ops)(inputs * np.nan, filter, bias=bias, residual=residual, activation=activation)
        plain = convolve(ops)(inputs * np.nan, filter)
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected(plain)))
        assert np.isnan(actual).any()


def gradients_of(function, inputs, filter, activation, **more):
    values = [tf.constant(value) for value in (inputs, filter, *more.values())]
    with tf.GradientTape() as tape:
        tape.watch(values)
        outputs = function(*values[:2], activation=activation, **dict(zip(more, values[2:])))
        loss = tf.reduce_sum(tf.sin(outputs))
    return tape.gradient(loss, values)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("op", OPS)
def test_gradients(op, case):
    (inputs, _, filter, bias, residual), convolve = problem(op, case)
    for with_bias, with_residual, activation in CHOICES:
        more = {"bias": bias} if with_bias else {}
        more.update({"residual": residual} if with_residual else {})
        actual = gradients_of(convolve(ops), inputs, filter, activation, **more)
        expected = gradients_of(convolve(ops.reference), inputs, filter, activation, **more)
        for a, b in zip(actual, expected):
            size = max(1.0, float(tf.reduce_max(tf.abs(b))))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_by_differences(op, activation):
    (inputs, _, filter, bias, residual), convolve = problem(op)
    inputs, filter = tf.constant(inputs[:1, :3, :4]), tf.constant(filter)
    function = convolve(ops)
    # Away from the kinks of the activation, the ops are linear in each argument.
    residual = residual[:1, :3, :4]
    outputs = function(inputs, filter, bias=bias, residual=residual)
    for kink in (0, 6):
        residual = residual + np.float32(0.5) * (np.abs(outputs - kink) < 0.25)
        outputs = function(inputs, filter, bias=bias, residual=residual)
    values = [inputs, filter, tf.constant(bias), tf.constant(residual)]

    def fused(x, w, b, r):
        return function(x, w, bias=b, residual=r, activation=activation)

    theory, numbers = tf.test.compute_gradient(fused, values, delta=2.0**-7)
    for a, b in zip(theory, numbers):
        np.testing.assert_allclose(a, b, atol=5e-3)


@pytest.mark.parametrize("op", OPS)
def test_second_order(op):
    (inputs, _, filter, bias, residual), convolve = problem(op)
    values = [tf.constant(value) for value in (inputs, filter, bias, residual)]

    def second(function):
        with tf.GradientTape() as outer:
            outer.watch(values)
            with tf.GradientTape() as inner:
                inner.watch(values)
                outputs = function(*values[:2], bias=values[2], residual=values[3], activation="relu")
                loss = tf.reduce_sum(outputs**3)
            first = inner.gradient(loss, values)
            loss = tf.add_n([tf.reduce_sum(tf.sin(0.01 * g)) for g in first])
        return outer.gradient(loss, values)

    for actual, expected in zip(second(convolve(ops)), second(convolve(ops.reference))):
        size = float(tf.reduce_max(tf.abs(expected)))
        assert size > 0.01
        np.testing.assert_allclose(actual, expected, atol=1e-4 * size)


@pytest.mark.parametrize("op", OPS)
def test_graphs_of_unknown_shapes(op):
    (inputs, kernel, filter, bias, residual), convolve = problem(op)

    @tf.function(input_signature=[tf.TensorSpec([None] * 4), tf.TensorSpec([None]), tf.TensorSpec(None)])
    def graph(x, b, r):
        outputs = convolve(ops)(x, filter, bias=b, residual=r, activation="relu")
        return outputs, tf.gradients(outputs, [x, b, r])

    outputs, gradients = graph(inputs, bias, residual)
    expected = finish(oracle.conv2d(inputs, kernel, padding="same"), bias, residual, "relu")
    oracle.assert_close(outputs, expected, 45)
    assert [g.shape for g in gradients] == [inputs.shape, bias.shape, residual.shape]
    with pytest.raises(tf.errors.InvalidArgumentError, match="bias must have a value for each output channel, 19"):
        graph(inputs, bias[1:], residual)
    with pytest.raises(tf.errors.InvalidArgumentError, match="residual must have the shape"):
        graph(inputs, bias, residual[:1])
    with pytest.raises(tf.errors.InvalidArgumentError, match="residual must have rank 4"):
        graph(inputs, bias, residual[0])


@pytest.mark.parametrize("op", OPS)
def test_what_a_residual_tells_of_the_output(op):
    (_, _, filter, _, _), convolve = problem(op)

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 5]), tf.TensorSpec([2, 9, None, None])])
    def graph(x, r):
        outputs = convolve(ops)(x, filter, residual=r)
        assert outputs.shape.as_list() == [2, 9, None, 19]
        return outputs

    graph.get_concrete_function()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_half_precision_rounds_once(op, dtype):
    (inputs, _, filter, bias, residual), convolve = problem(op)
    halves = [tf.cast(v, dtype) for v in (inputs, filter, bias, residual)]
    x, w, b, r = [tf.cast(v, tf.float32) for v in halves]
    actual = convolve(ops)(*halves[:2], bias=halves[2], residual=halves[3], activation="relu")
    assert actual.dtype == dtype
    expected = tf.cast(convolve(ops)(x, w, bias=b, residual=r, activation="relu"), dtype)
    np.testing.assert_array_equal(tf.cast(actual, "float32"), tf.cast(expected, "float32"))


@pytest.mark.parametrize("op", OPS)
def test_wrong_arguments(op):
    (inputs, _, filter, bias, residual), convolve = problem(op)
    function = convolve(ops)
    for error, match, wrong in [
        (TypeError, "`activation` must be None or one of linear, relu, relu6, received <function", tf.nn.relu),
        (ValueError, "`activation` must be None or one of linear, relu, relu6, received 'elu'", "elu"),
    ]:
        with pytest.raises(error, match=match):
            function(inputs, filter, activation=wrong)
    with pytest.raises(ValueError, match="`bias` must have a value for each output channel, received 18 and 19"):
        function(inputs, filter, bias=bias[1:])
    with pytest.raises(ValueError, match="`bias` must have rank 1"):
        function(inputs, filter, bias=bias[None])
    with pytest.raises(TypeError, match="`bias` must be float32"):
        function(inputs, filter, bias=bias.astype("int32"))
    with pytest.raises(ValueError, match=r"`residual` must have the shape of the convolution's output, \(2, 9, 10"):
        function(inputs, filter, residual=residual[:, 1:])
    with pytest.raises(ValueError, match="`residual` must have rank 4"):
        function(inputs, filter, residual=residual[0])


def test_raw_ops_check_their_lists():
    raw = ops.library.load()
    x, w = np.ones((1, 3, 3, 2), "f"), np.ones((2, 1, 1), "f")
    table = (np.array([0, 2], "i4"), np.array([0, 1], "i4"))
    one, good = np.ones(1, "f"), dict(padding="SAME")
    np.testing.assert_array_equal(
        raw.keras_sparse_fused_connection_conv2d(x, w, *table, [], [], **good), 2 * x[..., :1]
    )
    np.testing.assert_array_equal(
        raw.keras_sparse_fused_connection_conv2d(x, w, *table, [one], [], **good), 3 * x[..., :1]
    )
    for bias, residual, match in [
        ([one, one], [], "bias must be a list of at most one tensor, received 2"),
        ([], [x, x], "residual must be a list of at most one tensor, received 2"),
        ([np.ones(2, "f")], [], "bias must have a value for each output channel, 1, received 2"),
        ([], [x], "residual must have the shape of the convolution's output"),
    ]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=match):
            raw.keras_sparse_fused_connection_conv2d(x, w, *table, bias, residual, **good)
    with pytest.raises(tf.errors.InvalidArgumentError, match="activation"):
        raw.keras_sparse_fused_connection_conv2d(x, w, *table, [], [], activation="elu", **good)
