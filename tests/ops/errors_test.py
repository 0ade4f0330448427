# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""Nothing a caller passes reads or writes out of bounds: every wrong argument is an error."""

import numpy as np
import pytest
import tensorflow as tf

from keras_sparse import ops

BAD = tf.errors.InvalidArgumentError
X = np.ones((2, 6, 6, 4), np.float32)
DY = np.ones((2, 4, 4, 3), np.float32)  # Of a 3x3 kernel with padding VALID.
TABLE = dict(row_splits=np.array([0, 2, 2, 5], "i4"), input_channels=np.array([0, 3, 0, 1, 2], "i4"))
W = np.ones((5, 3, 3), np.float32)
INDICES = dict(indices=np.array([0, 7, 12, 35], "i4"))
W2 = np.ones((4, 3), np.float32)
SIZES = np.array([2, 6, 6, 4], "i4")
GOOD = {
    "connection_conv2d": dict(input=X, filter=W, **TABLE),
    "connection_conv2d_backprop_input": dict(input_sizes=SIZES, filter=W, **TABLE, out_backprop=DY),
    "connection_conv2d_backprop_filter": dict(input=X, **TABLE, out_backprop=DY, kernel_size=[3, 3]),
    "thinned_conv2d": dict(input=X, filter=W2, **INDICES, kernel_size=[3, 3]),
    "thinned_conv2d_backprop_input": dict(input_sizes=SIZES, filter=W2, **INDICES, out_backprop=DY, kernel_size=[3, 3]),
    "thinned_conv2d_backprop_filter": dict(input=X, **INDICES, out_backprop=DY, kernel_size=[3, 3]),
}
for _name in ("connection_conv2d", "thinned_conv2d"):
    GOOD[f"fused_{_name}"] = dict(GOOD[_name], bias=[np.ones(3, "f")], residual=[DY])
I4 = lambda *values: np.array(values, "i4")  # noqa: E731
LARGEST = 2**31 - 1

# Argument, hostile value, what the message must say. Applied to every op that has the argument.
HOSTILE = [
    ("row_splits", I4(1, 2, 2, 5), r"row_splits must start with 0.*row_splits\[0\] = 1"),
    ("row_splits", I4(-1, 2, 2, 5), r"row_splits\[0\] = -1"),
    ("row_splits", I4(0, 3, 2, 5), r"not decrease.*row_splits\[2\] = 2 after 3"),
    ("row_splits", I4(0, 2, 2, 4), r"number of connections, 5.*row_splits\[3\] = 4"),
    ("row_splits", I4(0, 2, 2, 6), r"row_splits\[3\] = 6"),
    ("row_splits", I4(0, LARGEST, LARGEST, 5), r"row_splits\[1\] = 2147483647"),
    ("row_splits", I4(0, -(2**31), 2, 5), r"row_splits\[1\] = -2147483648"),
    ("row_splits", I4(), "row_splits must have out_channels"),
    ("row_splits", I4(0, 2, 2, 5).reshape(2, 2), "row_splits must have rank 1"),
    ("input_channels", I4(0, 3, 0, 1, 4), r"number of input channels, 4.*input_channels\[4\] = 4"),
    ("input_channels", I4(-1, 3, 0, 1, 2), r"input_channels\[0\] = -1"),
    ("input_channels", I4(0, LARGEST, 0, 1, 2), r"input_channels\[1\] = 2147483647"),
    ("input_channels", I4(3, 0, 0, 1, 2), r"strictly increasing.*input_channels\[1\] = 0 after 3"),
    ("input_channels", I4(0, 3, 1, 1, 2), r"input_channels\[3\] = 1 after 1"),
    ("input_channels", I4(0, 3, 0, 1), "row_splits must|filter must have as many"),
    ("input_channels", I4(0, 3, 0, 1, 2).reshape(5, 1), "input_channels must have rank 1"),
    ("indices", I4(-1, 7, 12, 35), r"indices must be at least 0.*indices\[0\] = -1"),
    ("indices", I4(0, 7, 12, 36), r"in_channels, 36.*indices\[3\] = 36"),
    ("indices", I4(0, 7, 12, LARGEST), r"indices\[3\] = 2147483647"),
    ("indices", I4(0, 12, 7, 35), r"strictly increasing.*indices\[2\] = 7 after 12"),
    ("indices", I4(0, 7, 7, 35), r"indices\[2\] = 7 after 7"),
    ("indices", I4(0, 7, 12, 35).reshape(2, 2), "indices must have rank 1"),
    ("kernel_size", [3], "kernel_size must have 2 values"),
    ("kernel_size", [3, 0], "kernel_size must be between 1"),
    ("kernel_size", [-3, 3], "kernel_size must be between 1"),
    ("kernel_size", [7, 3], "at least the dilated kernel's 7, received 6"),
    ("kernel_size", [LARGEST, LARGEST], "kernel|sizes"),
    ("strides", [1], "strides must have 2 values"),
    ("strides", [0, 1], "strides must be between 1"),
    ("strides", [1, 2**40], "strides must be between 1"),
    ("dilations", [1, 1, 1], "dilations must have 2 values"),
    ("dilations", [1, -1], "dilations must be between 1"),
    ("dilations", [LARGEST, 1], "at least the dilated kernel's"),
    ("padding", "CAUSAL", "padding|CAUSAL"),
    ("explicit_paddings", [1, 1, 1, 1], "explicit_paddings must be empty unless"),
    ("padding", "EXPLICIT", "explicit_paddings must have 4 values"),
    ("input", X[0], "input must have rank 4"),
    ("filter", np.ones((5, 3), "f"), "filter must have"),
    ("filter", np.ones((5, 3, 3, 1), "f"), "filter must have rank"),
    ("filter", np.ones((7, 3, 3), "f"), "filter must have"),
    ("filter", np.ones((3, 3), "f"), "filter must have"),
    ("out_backprop", DY[0], "out_backprop must have rank 4"),
    ("out_backprop", DY[:1], "out_backprop must have"),
    ("out_backprop", DY[:, 1:], "out_backprop must have"),
    ("out_backprop", DY[:, :, 1:], "out_backprop must have"),
    ("input_sizes", I4(2, 6, 6), "input_sizes must have 4 values"),
    ("input_sizes", I4(2, -6, 6, 4), "input_sizes must not be negative|Dimension|-6"),
    ("input_sizes", I4(2, 600, 6, 4), "out_backprop must have"),
    ("input_sizes", I4(1, 6, 6, 4), "out_backprop must have"),
    ("input_sizes", I4(2, 6, 6, 2), "input_channels must be|indices must be"),
    ("input_sizes", I4(2, 2, 2, 4), "padded input height"),
]


def call(op, **changes):
    function = getattr(ops.library.load(), f"keras_sparse_{op}")
    return function(**{"padding": "VALID", **GOOD[op], **changes})


@pytest.mark.parametrize("op", list(GOOD))
def test_hostile_arguments(op):
    call(op)
    taken = 0
    for argument, value, message in HOSTILE:
        if argument not in GOOD[op] and argument not in (
            "strides",
            "dilations",
            "padding",
            "explicit_paddings",
        ):
            continue
        with pytest.raises((BAD, ValueError), match=f"(?s){message}"):
            print(op, argument, value)
            call(op, **{argument: value})
        taken += 1
    assert taken >= 20


def test_wrong_channels_of_out_backprop():
    for op in GOOD:
        if "out_backprop" in GOOD[op] and op != "thinned_conv2d_backprop_filter":
            with pytest.raises(BAD, match="out_backprop must have"):
                call(op, out_backprop=DY[..., :2])


def test_explicit_paddings():
    for values in ([1, 1, 1], [-1, 1, 1, 1], [0, 0, 0, 2**40]):
        for op in GOOD:
            with pytest.raises(BAD, match="explicit_paddings must"):
                call(op, padding="EXPLICIT", explicit_paddings=values)


def test_zero_kernel():
    with pytest.raises(BAD, match="kernel"):
        call("connection_conv2d", filter=np.ones((5, 0, 3), "f"))


def test_values_known_at_run_time_only():
    """The shape functions know nothing here; the kernels check all the same."""

    @tf.function(input_signature=[tf.TensorSpec(None, tf.int32)] * 2)
    def convolve(row_splits, input_channels):
        return ops.connection_conv2d(X, tf.ones([5, 3, 3]), row_splits, input_channels)

    convolve(*TABLE.values())
    for argument, value, message in HOSTILE:
        if argument in TABLE:
            with pytest.raises(BAD, match=f"(?s){message}"):
                convolve(**{**TABLE, argument: value})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(strides=0), ValueError, "`strides` must be .*received 0"),
        (dict(strides=(1, 2, 3)), ValueError, "`strides` must be"),
        (dict(strides=1.5), TypeError, "`strides` must be .*received 1.5"),
        (dict(strides=True), TypeError, "`strides` must be"),
        (dict(dilation_rate=-1), ValueError, "`dilation_rate` must be .*received -1"),
        (dict(padding="causal"), ValueError, "`padding` must be .*received 'causal'"),
        (dict(padding=((1, 1), (1, -1))), ValueError, "`padding` must .*-1"),
        (dict(padding=(1, 1)), TypeError, "`padding` must be"),
        (dict(padding=3), TypeError, "`padding` must be"),
        (dict(data_format="channels_first"), ValueError, "`data_format` must be .*transpose"),
        (dict(inputs=X[0]), ValueError, "`inputs` must have rank 4"),
        (dict(inputs=X.astype("i4")), TypeError, "`inputs` must be float32.*received int32"),
        (dict(inputs=X.astype("f8")), TypeError, "`inputs` must be float32.*received float64"),
        (dict(inputs=X[:, :2]), ValueError, "padded height .*3, received 2"),
    ],
)
def test_python_arguments(changes, error, message):
    connection = dict(inputs=X, filter=W, **TABLE)
    thinned = dict(inputs=X, filter=W2, **INDICES, kernel_size=3)
    ops.connection_conv2d(**connection)
    ops.thinned_conv2d(**thinned)
    with pytest.raises(error, match=message):
        ops.connection_conv2d(**{**connection, **changes})
    with pytest.raises(error, match=message):
        ops.thinned_conv2d(**{**thinned, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(filter=W[0]), ValueError, "`filter` must have rank 3"),
        (dict(filter=W[:4]), ValueError, "`filter` must have as many connections.* 4 and 5"),
        (dict(filter=W[:, :0]), ValueError, "`filter` must have a kernel height"),
        (dict(row_splits=[]), ValueError, "`row_splits` must have out_channels"),
        (dict(row_splits=[0.0, 5.0]), TypeError, "`row_splits` must be int32"),
        (dict(row_splits=[0, 4]), ValueError, "`row_splits` must start with 0.*connections, 5"),
        (dict(row_splits=[1, 5]), ValueError, "`row_splits` must start with 0"),
        (dict(input_channels=[0, 3, 0, 1, 4]), ValueError, "`input_channels` must be.*0 to 4"),
        (dict(input_channels=[3, 0, 0, 1, 2]), ValueError, "strictly increasing.*0 after 3"),
        (dict(input_channels=np.array([0, 3, 0, 1, 2**40])), ValueError, "`input_channels` must"),
    ],
)
def test_python_tables(changes, error, message):
    with pytest.raises(error, match=message):
        ops.connection_conv2d(**{**dict(inputs=X, filter=W, **TABLE), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(filter=W2[0]), ValueError, "`filter` must have rank 2"),
        (dict(filter=W2[:3]), ValueError, "`filter` must have as many rows.* 3 and 4"),
        (dict(indices=[0, 7, 12, 36]), ValueError, "`indices` must be.*36; received.*36"),
        (dict(indices=[-1, 7, 12, 35]), ValueError, "`indices` must be.*from -1"),
        (dict(indices=[0, 7, 7, 35]), ValueError, "`indices` must be strictly.*7 after 7"),
        (dict(indices=[[0, 7, 12, 35]]), ValueError, "`indices` must have rank 1"),
        (dict(kernel_size=0), ValueError, "`kernel_size` must be"),
        (dict(kernel_size="3"), TypeError, "`kernel_size` must be"),
        (dict(kernel_size=2**20, padding="same"), ValueError, "`kernel_size` must keep"),
    ],
)
def test_python_indices(changes, error, message):
    arguments = dict(inputs=X, filter=W2, **INDICES, kernel_size=3)
    with pytest.raises(error, match=message):
        ops.thinned_conv2d(**{**arguments, **changes})
