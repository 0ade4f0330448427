# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""Outputs of both ops, and of the reference, against the float64 oracle."""

import numpy as np
import oracle
import pytest
import tensorflow as tf

from keras_sparse import ops

KERNELS = [(1, 1), (1, 7), (7, 1), (3, 3), (5, 5), (11, 11)]
EXPLICIT = ((2, 0), (1, 3))

# (batch, height, width, in_channels, out_channels, kernel, strides, padding, dilations, density)
CASES = []
for _kernel in KERNELS:
    for _padding in ("valid", "same", EXPLICIT):
        CASES.append((2, 13, 12, 5, 7, _kernel, (1, 1), _padding, (1, 1), 0.5))
    CASES.append((2, 16, 17, 17, 19, _kernel, (2, 2), "same", (1, 1), 0.1))
for _stride in (1, 2, 4):
    for _dilation in (1, 2, 3):
        for _padding in ("valid", "same", EXPLICIT):
            _steps, _gaps = (_stride, _stride), (_dilation, _dilation)
            CASES.append((2, 14, 11, 3, 18, (3, 3), _steps, _padding, _gaps, 0.5))
    CASES.append((2, 9, 15, 4, 3, (3, 2), (_stride, 1), "same", (1, 3), 0.5))
for _density in (0.0, 0.1, 0.5, 1.0):
    CASES.append((3, 10, 9, 17, 33, (3, 3), (1, 1), "same", (1, 1), _density))
for _size in (1, 2, 4, 7, 15, 16, 17, 31, 32, 33, 64):
    CASES.append((4, _size, _size, 3, 5, (3, 3), (1, 1), "same", (1, 1), 0.5))
    CASES.append((3, _size, _size, 16, 5, (1, 1), (1, 1), "valid", (1, 1), 0.5))
for _channels in ((1, 1), (1, 17), (3, 64), (17, 1), (64, 3), (64, 64)):
    CASES.append((1, 8, 8, *_channels, (3, 3), (1, 1), "same", (1, 1), 0.3))
CASES.append((0, 8, 8, 3, 4, (3, 3), (1, 1), "same", (1, 1), 0.5))
CASES.append((40, 4, 4, 48, 20, (3, 3), (1, 1), "same", (1, 1), 0.1))
CASES.append((1, 70, 66, 40, 20, (3, 3), (1, 1), "same", (1, 1), 0.1))
CASES.append((2, 3, 3, 0, 4, (3, 3), (1, 1), "same", (1, 1), 0.5))
CASES.append((2, 3, 3, 4, 0, (3, 3), (1, 1), "same", (1, 1), 0.5))


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("path", ["op", "reference"])
def test_outputs(path, part):
    for case in range(part, len(CASES), 8):
        # A third of the cases is enough for the reference, which needs something to compute.
        if path == "op" or (case % 3 == 0 and 0 not in CASES[case][:5]):
            check_outputs(path, case)


def check_outputs(path, case):
    batch, height, width, ci, co, kernel_size, strides, padding, dilations, density = CASES[case]
    module = ops if path == "op" else ops.reference
    generator = oracle.rng(1, case)
    inputs = generator.standard_normal((batch, height, width, ci)).astype(np.float32)
    terms = kernel_size[0] * kernel_size[1] * ci
    arguments = dict(strides=strides, padding=padding, dilation_rate=dilations)

    kernel, *table = oracle.connection_table(generator, density, kernel_size, ci, co)
    expected = oracle.conv2d(inputs, kernel, strides, padding, dilations)
    oracle.assert_close(module.connection_conv2d(inputs, *table, **arguments), expected, terms)

    kernel, *thinned = oracle.thinned_filter(generator, density, kernel_size, ci, co)
    expected = oracle.conv2d(inputs, kernel, strides, padding, dilations)
    actual = module.thinned_conv2d(inputs, *thinned, kernel_size, **arguments)
    oracle.assert_close(actual, expected, terms)


def test_the_ops_are_what_is_tested():
    assert ops.is_available()


def test_oracle_agrees_with_tensorflow():
    generator = oracle.rng(2)
    inputs = generator.standard_normal((2, 9, 10, 3))
    kernel = generator.standard_normal((3, 2, 3, 4))
    for strides, padding, dilations in [((2, 2), "same", (1, 1)), ((1, 1), "valid", (2, 3))]:
        expected = tf.nn.conv2d(inputs, kernel, strides, padding.upper(), dilations=dilations)
        actual = oracle.conv2d(inputs, kernel, strides, padding, dilations)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def test_grouped_convolution_is_a_table():
    generator = oracle.rng(3)
    inputs = generator.standard_normal((2, 6, 6, 8)).astype(np.float32)
    kernel = generator.standard_normal((3, 3, 2, 12)).astype(np.float32)  # 4 groups: 2 in, 3 out.
    filter = np.transpose(kernel, (3, 2, 0, 1)).reshape(24, 3, 3)
    row_splits = np.arange(0, 25, 2)
    input_channels = np.concatenate([[2 * (o // 3), 2 * (o // 3) + 1] for o in range(12)])
    actual = ops.connection_conv2d(inputs, filter, row_splits, input_channels, padding="same")
    expected = tf.nn.conv2d(inputs, kernel, 1, "SAME")
    oracle.assert_close(actual, expected, 18)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    generator = oracle.rng(4)
    inputs = tf.cast(generator.standard_normal((2, 9, 9, 17)), dtype)
    kernel, filter, *table = oracle.connection_table(generator, 0.5, (3, 3), 17, 5)
    filter = tf.cast(filter, dtype)
    actual = ops.connection_conv2d(inputs, filter, *table)
    assert actual.dtype == dtype
    dense = ops.reference.connection_kernel(tf.cast(filter, "float32"), *table, 17)
    expected = oracle.conv2d(tf.cast(inputs, "float64"), dense)
    oracle.assert_close(tf.cast(actual, "float32"), expected, 153, dtype)

    kernel, filter, indices = oracle.thinned_filter(generator, 0.5, (3, 3), 17, 5)
    filter = tf.cast(filter, dtype)
    actual = ops.thinned_conv2d(inputs, filter, indices, 3)
    assert actual.dtype == dtype
    dense = ops.reference.thinned_kernel(tf.cast(filter, "float32"), indices, (3, 3), 17)
    expected = oracle.conv2d(tf.cast(inputs, "float64"), dense)
    oracle.assert_close(tf.cast(actual, "float32"), expected, 153, dtype)


@pytest.mark.parametrize("padding", ["same", "valid", EXPLICIT])
def test_unknown_shapes_in_a_graph(padding):
    generator = oracle.rng(5)
    kernel, *table = oracle.connection_table(generator, 0.5, (3, 3), 3, 5)
    thinned_kernel, *thinned = oracle.thinned_filter(generator, 0.5, (3, 3), 3, 5)

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
    def both(x):
        a = ops.connection_conv2d(x, *table, strides=2, padding=padding)
        b = ops.thinned_conv2d(x, *thinned, 3, strides=2, padding=padding)
        assert a.shape.as_list() == [None, None, None, 5]
        assert b.shape.as_list() == [None, None, None, 5]
        return a, b, tf.gradients(a, x)[0], tf.gradients(b, x)[0]

    for shape in [(1, 8, 9, 3), (4, 13, 5, 3)]:
        inputs = generator.standard_normal(shape).astype(np.float32)
        a, b, gradient_a, gradient_b = both(inputs)
        oracle.assert_close(a, oracle.conv2d(inputs, kernel, (2, 2), padding), 27)
        oracle.assert_close(b, oracle.conv2d(inputs, thinned_kernel, (2, 2), padding), 27)
        assert gradient_a.shape == gradient_b.shape == shape


def test_unknown_everything_in_a_graph():
    generator = oracle.rng(6)
    kernel, *table = oracle.connection_table(generator, 0.5, (3, 3), 3, 5)
    inputs = generator.standard_normal((2, 6, 7, 3)).astype(np.float32)

    @tf.function(
        input_signature=[
            tf.TensorSpec(None),
            tf.TensorSpec(None),
            tf.TensorSpec(None, tf.int32),
            tf.TensorSpec(None, tf.int32),
        ]
    )
    def convolve(x, filter, row_splits, input_channels):
        outputs = ops.connection_conv2d(x, filter, row_splits, input_channels)
        assert outputs.shape.rank == 4
        return outputs

    oracle.assert_close(convolve(inputs, *table), oracle.conv2d(inputs, kernel), 27)


def test_static_shapes():
    @tf.function
    def shapes(x):
        a = ops.connection_conv2d(
            x,
            tf.zeros([2, 3, 5]),
            [0, 1, 1, 2],
            [0, 0],
            strides=(2, 3),
            padding=((1, 2), (0, 4)),
            dilation_rate=(2, 1),
        )
        b = ops.thinned_conv2d(x, tf.zeros([2, 7]), [0, 5], (3, 5), strides=(2, 3), padding="same")
        sizes = tf.constant([2, 20, 30, 1])
        raw = ops.library.load().keras_sparse_thinned_conv2d_backprop_input(
            sizes, tf.zeros([2, 7]), [0, 5], b, kernel_size=[3, 5], strides=[2, 3], padding="SAME"
        )
        assert raw.shape.as_list() == [2, 20, 30, 1]
        return a.shape.as_list(), b.shape.as_list()

    a, b = shapes(tf.zeros([2, 20, 30, 1]))
    assert [int(v) for v in a] == [2, 10, 10, 3]
    assert [int(v) for v in b] == [2, 10, 10, 7]


def test_accepts_numpy_lists_and_int64():
    inputs = np.ones((1, 3, 3, 2), np.float32)
    filter = [[[1.0]], [[2.0]]]
    expected = np.full((1, 3, 3, 1), 3.0)
    for kind in (list, np.array, lambda v: tf.constant(v, tf.int64)):
        actual = ops.connection_conv2d(inputs, filter, kind([0, 2]), kind([0, 1]), padding="SAME")
        np.testing.assert_array_equal(actual, expected)
        actual = ops.thinned_conv2d(inputs, [[1.0], [2.0]], kind([0, 1]), 1, padding="Valid")
        np.testing.assert_array_equal(actual, expected)


def test_huge_dilation_takes_no_memory():
    """A kernel that reaches far beyond the image falls back to the scalar routine."""
    inputs = oracle.rng(7).standard_normal((1, 4, 4, 2)).astype(np.float32)
    far = 2**24
    filter = np.ones((2, 3, 3), np.float32)
    actual = ops.connection_conv2d(inputs, filter, [0, 2], [0, 1], padding=((far, far), (far, far)), dilation_rate=far)
    # Only the central tap meets the image.
    np.testing.assert_allclose(actual, inputs.sum(-1, keepdims=True), rtol=1e-6)


def errors_beside_plain_sums(inputs, kernel, actual):
    """Root mean square error of a 3x3 convolution, as a multiple of that of adding one product after the other.

    TensorFlow's own errors depend on the CPU: it runs oneDNN on some and Eigen, whose sums are shorter, on others.
    """
    expected = oracle.conv2d(inputs, kernel, padding="same")
    padded = np.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    direct = np.zeros(expected.shape, np.float32)
    height, width = inputs.shape[1:3]
    for s in range(inputs.shape[-1]):
        for i in range(3):
            for j in range(3):
                direct += padded[:, i : i + height, j : j + width, s, None] * kernel[i, j, s]

    def error(values):
        return np.sqrt(np.mean((np.asarray(values, np.float64) - expected) ** 2))

    return error(actual) / error(direct)


@pytest.mark.parametrize(("channels", "density"), [(32, 1.0), (64, 0.5), (256, 0.1)])
def test_minimal_filtering_is_about_as_accurate_as_direct_sums(channels, density):
    """3x3 tables of many channels run as F(4, 3); with its customary points errors would be twice as large."""
    generator = oracle.rng(9, channels)
    kernel, filter, row_splits, input_channels = oracle.connection_table(generator, density, (3, 3), channels, 64)
    inputs = generator.standard_normal((4, 16, 16, channels)).astype(np.float32)
    sparse = ops.connection_conv2d(inputs, filter, row_splits, input_channels, padding="same")
    assert errors_beside_plain_sums(inputs, kernel, sparse) < 1.7


@pytest.mark.parametrize(("channels", "density"), [(32, 1.0), (64, 0.5), (256, 0.6)])
def test_minimal_filtering_of_squares_is_accurate(channels, density):
    """Thinned 3x3 kernels run as F(4x4, 3x3): errors are those of rows, twice over."""
    generator = oracle.rng(10, channels)
    kernel, filter, indices = oracle.thinned_filter(generator, density, (3, 3), channels, 64)
    inputs = generator.standard_normal((4, 16, 16, channels)).astype(np.float32)
    sparse = ops.thinned_conv2d(inputs, filter, indices, (3, 3), padding="same")
    assert errors_beside_plain_sums(inputs, kernel, sparse) < 1.7**2


def test_library_path():
    assert ops.library_path().endswith("_keras_sparse_ops.so")
    version = ops.library.built_for(ops.library_path())
    assert version.split(".")[:2] == tf.__version__.split(".")[:2]
