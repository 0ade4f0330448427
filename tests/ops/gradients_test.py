# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""First and second gradients of both ops."""

import numpy as np
import oracle
import pytest
import tensorflow as tf

from keras_sparse import ops

# (batch, height, width, in_channels, out_channels, kernel, strides, padding, density)
CASES = [
    (2, 13, 12, 17, 7, (3, 3), (1, 1), "same", 0.5),
    (2, 13, 12, 3, 18, (3, 3), (2, 2), "same", 0.5),
    (2, 14, 15, 4, 5, (3, 3), (4, 1), "valid", 0.5),
    (2, 10, 9, 5, 6, (5, 5), (1, 2), ((3, 1), (0, 4)), 0.5),
    (3, 7, 7, 16, 33, (1, 1), (1, 1), "valid", 0.1),
    (3, 7, 7, 6, 5, (1, 1), (2, 2), "valid", 0.5),
    (2, 9, 17, 6, 5, (1, 7), (1, 1), "same", 0.5),
    (2, 17, 9, 6, 5, (7, 1), (1, 1), "same", 0.5),
    (1, 16, 15, 3, 4, (11, 11), (4, 4), "same", 0.5),
    (2, 8, 8, 64, 20, (3, 3), (1, 1), "same", 0.05),
    (2, 8, 9, 4, 5, (3, 3), (1, 1), "same", 1.0),
    (2, 8, 9, 4, 5, (3, 3), (1, 1), "same", 0.0),
    (40, 4, 4, 20, 17, (3, 3), (1, 1), "same", 0.1),
    (1, 40, 33, 8, 9, (3, 1), (1, 1), "same", 0.5),
]


def tf_padding(padding):
    return padding.upper() if isinstance(padding, str) else [(0, 0), *padding, (0, 0)]


def dense_gradients(inputs, kernel, upstream, strides, padding):
    """Gradients of sum(conv2d * upstream) in float64; explicit paddings by hand."""
    inputs, kernel = tf.cast(inputs, tf.float64), tf.cast(kernel, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch([inputs, kernel])
        padded, name = inputs, padding
        if not isinstance(padding, str):
            padded, name = tf.pad(inputs, tf_padding(padding)), "valid"
        outputs = tf.nn.conv2d(padded, kernel, strides, name.upper())
        loss = tf.reduce_sum(outputs * tf.cast(upstream, tf.float64))
    return tape.gradient(loss, [inputs, kernel])


def check_gradients(convolve, inputs, filter, kernel, gather, strides, padding, generator):
    """Compares with the dense convolution; `gather` takes the kept values of a dense gradient."""
    inputs, filter = tf.constant(inputs), tf.constant(filter)
    with tf.GradientTape() as tape:
        tape.watch([inputs, filter])
        outputs = convolve(inputs, filter)
        upstream = generator.standard_normal(outputs.shape).astype(np.float32)
        loss = tf.reduce_sum(outputs * upstream)
    actual = tape.gradient(loss, [inputs, filter])
    expected = dense_gradients(inputs, kernel, upstream, strides, padding)
    co = kernel.shape[3]
    oracle.assert_close(actual[0], expected[0], kernel.shape[0] * kernel.shape[1] * co)
    oracle.assert_close(actual[1], gather(expected[1]), upstream.size // co)


def check_case(module, case):
    batch, height, width, ci, co, kernel_size, strides, padding, density = CASES[case]
    generator = oracle.rng(11, case)
    inputs = generator.standard_normal((batch, height, width, ci)).astype(np.float32)
    kernel, filter, *table = oracle.connection_table(generator, density, kernel_size, ci, co)
    check_gradients(
        lambda x, w: module.connection_conv2d(x, w, *table, strides=strides, padding=padding),
        inputs,
        filter,
        kernel,
        lambda dense: oracle.gather_table(dense, *table),
        strides,
        padding,
        generator,
    )
    kernel, filter, indices = oracle.thinned_filter(generator, density, kernel_size, ci, co)
    check_gradients(
        lambda x, w: module.thinned_conv2d(x, w, indices, kernel_size, strides=strides, padding=padding),
        inputs,
        filter,
        kernel,
        lambda dense: oracle.gather_thinned(dense, indices),
        strides,
        padding,
        generator,
    )


@pytest.mark.parametrize("path", ["op", "reference"])
def test_against_dense_convolution(path):
    for case in range(0, len(CASES), 1 if path == "op" else 3):
        check_case(ops if path == "op" else ops.reference, case)


def convolutions(generator, ci, co, kernel_size, **arguments):
    """Both ops as functions of (inputs, filter), with their filters and dense kernels."""
    kernel, filter, *table = oracle.connection_table(generator, 0.5, kernel_size, ci, co)
    yield lambda x, w: ops.connection_conv2d(x, w, *table, **arguments), filter
    kernel, filter, indices = oracle.thinned_filter(generator, 0.5, kernel_size, ci, co)
    yield lambda x, w: ops.thinned_conv2d(x, w, indices, kernel_size, **arguments), filter


@pytest.mark.parametrize(
    "arguments",
    [
        dict(padding="same"),
        dict(strides=2, dilation_rate=2, padding="same"),
        dict(strides=(3, 1), dilation_rate=(1, 2), padding=((1, 2), (3, 0))),
    ],
)
def test_numerically(arguments):
    """Central differences; also where TensorFlow's convolution refuses: stride and dilation."""
    generator = oracle.rng(12)
    inputs = tf.constant(generator.standard_normal((2, 7, 8, 3)), tf.float32)
    for convolve, filter in convolutions(generator, 3, 4, (3, 2), **arguments):
        # The ops are linear in each argument: a step of 1 has no truncation error.
        theory, numbers = tf.test.compute_gradient(convolve, [inputs, filter], delta=1.0)
        for a, b in zip(theory, numbers):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_second_order():
    """Gradients of gradients against those of the dense convolution."""
    generator = oracle.rng(13)
    inputs = tf.constant(generator.standard_normal((2, 8, 7, 5)), tf.float32)

    def second(convolve, filter):
        with tf.GradientTape() as outer:
            outer.watch([inputs, filter])
            with tf.GradientTape() as inner:
                inner.watch([inputs, filter])
                loss = tf.reduce_sum(convolve(inputs, filter) ** 3)
            first = inner.gradient(loss, [inputs, filter])
            loss = tf.reduce_sum(tf.sin(first[0])) + tf.reduce_sum(tf.sin(first[1]))
        return outer.gradient(loss, [inputs, filter])

    _, filter, *table = oracle.connection_table(generator, 0.5, (3, 3), 5, 6)
    _, filter2, indices = oracle.thinned_filter(generator, 0.5, (3, 3), 5, 6)

    def connection(module, strides):
        return lambda x, w: module.connection_conv2d(x, w, *table, strides, "same")

    def thinned(module, strides):
        return lambda x, w: module.thinned_conv2d(x, w, indices, 3, strides, "same")

    for strides in (1, 2):
        for convolve, values in ((connection, filter), (thinned, filter2)):
            values = tf.constant(0.1 * values)
            actual = second(convolve(ops, strides), values)
            expected = second(convolve(ops.reference, strides), values)
            for a, b in zip(actual, expected):
                size = float(tf.reduce_max(tf.abs(b)))
                assert size > 0.1
                np.testing.assert_allclose(a, b, atol=1e-4 * size)


def test_float16_gradients():
    generator = oracle.rng(14)
    inputs = tf.cast(generator.standard_normal((1, 6, 6, 3)), tf.float16)
    for convolve, filter in convolutions(generator, 3, 4, (3, 3)):
        filter = tf.cast(filter, tf.float16)
        with tf.GradientTape() as tape:
            tape.watch([inputs, filter])
            loss = tf.reduce_sum(convolve(inputs, filter))
        for gradient, value in zip(tape.gradient(loss, [inputs, filter]), [inputs, filter]):
            assert gradient.dtype == tf.float16 and gradient.shape == value.shape
