# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""What the ops are tested against: convolutions in float64 NumPy, written from the formula."""

import numpy as np

SEED = 20240711


def rng(*keys):
    """A generator seeded with SEED and the integers that name a test case."""
    print(f"seed: {[SEED, *keys]}")  # pytest shows it when a test fails.
    return np.random.default_rng([SEED, *keys])


def pads(size, kernel, stride, dilation, padding, axis):
    """Zeros before and after an axis (0 height, 1 width)."""
    if padding == "valid":
        return 0, 0
    if padding == "same":
        out = -(-size // stride)
        total = max(0, (out - 1) * stride + (kernel - 1) * dilation + 1 - size)
        return total // 2, total - total // 2
    return padding[axis]


def conv2d(inputs, kernel, strides=(1, 1), padding="valid", dilations=(1, 1)):
    """NHWC inputs, HWIO kernel."""
    inputs, kernel = np.asarray(inputs, np.float64), np.asarray(kernel, np.float64)
    kh, kw = kernel.shape[:2]
    rows = pads(inputs.shape[1], kh, strides[0], dilations[0], padding, 0)
    columns = pads(inputs.shape[2], kw, strides[1], dilations[1], padding, 1)
    padded = np.pad(inputs, ((0, 0), rows, columns, (0, 0)))
    height = (padded.shape[1] - (kh - 1) * dilations[0] - 1) // strides[0] + 1
    width = (padded.shape[2] - (kw - 1) * dilations[1] - 1) // strides[1] + 1
    height, width = max(height, 0), max(width, 0)
    outputs = np.zeros((inputs.shape[0], height, width, kernel.shape[3]))
    for i in range(kh):
        for j in range(kw):
            y, x = i * dilations[0], j * dilations[1]
            window = padded[
                :,
                y : y + (height - 1) * strides[0] + 1 : strides[0],
                x : x + (width - 1) * strides[1] + 1 : strides[1],
            ]
            if height and width:
                outputs += window @ kernel[i, j]
    return outputs


def connection_table(generator, density, kernel_size, in_channels, out_channels):
    """Returns (dense HWIO kernel, filter, row_splits, input_channels)."""
    keep = generator.random((in_channels, out_channels)) < density
    if 0 < density < 1 and out_channels > 2:
        keep[:, 1] = False  # An output channel without connections.
    kernel = generator.standard_normal((*kernel_size, in_channels, out_channels)) * keep
    row_splits, input_channels, values = [0], [], []
    for o in range(out_channels):
        for s in np.flatnonzero(keep[:, o]):
            input_channels.append(s)
            values.append(kernel[:, :, s, o])
        row_splits.append(len(input_channels))
    return (
        kernel.astype(np.float32),
        np.array(values, np.float32).reshape(-1, *kernel_size),
        np.array(row_splits, np.int32),
        np.array(input_channels, np.int32),
    )


def thinned_filter(generator, density, kernel_size, in_channels, out_channels):
    """Returns (dense HWIO kernel, filter, indices)."""
    rows = kernel_size[0] * kernel_size[1] * in_channels
    keep = generator.random(rows) < density
    matrix = generator.standard_normal((rows, out_channels)) * keep[:, None]
    return (
        matrix.reshape(*kernel_size, in_channels, out_channels).astype(np.float32),
        matrix[keep].astype(np.float32),
        np.flatnonzero(keep).astype(np.int32),
    )


def gather_table(dense, row_splits, input_channels):
    """The values of a dense HWIO gradient at the connections of a table."""
    outputs = np.repeat(np.arange(len(row_splits) - 1), np.diff(row_splits))
    return np.moveaxis(np.asarray(dense)[:, :, input_channels, outputs], 2, 0)


def gather_thinned(dense, indices):
    """The values of a dense HWIO gradient at the kept rows."""
    dense = np.asarray(dense)
    return dense.reshape(-1, dense.shape[-1])[indices]


EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def assert_close(actual, expected, terms, dtype="float32"):
    """Compares sums of `terms` products of standard normals; the tolerance grows with both."""
    expected = np.asarray(expected, np.float64)
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape
    # Rounding errors of a float32 sum, and one rounding of the result to the dtype.
    absolute = 8 * EPSILON["float32"] * max(8, terms) ** 0.5 * 4
    np.testing.assert_allclose(actual, expected, rtol=2 * EPSILON[dtype], atol=absolute)
