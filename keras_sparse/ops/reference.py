# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""The sparse convolutions in `keras.ops`: the kernel is made dense, then convolved.

Slow but simple, and differentiable on every backend. This is what computes when the compiled ops
are missing, and what they are tested against.
"""

from keras import ops


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _conv2d(inputs, kernel, strides, padding, dilation_rate):
    """`keras.ops.conv` with explicit paddings, and strides and dilations that may both exceed 1."""
    strides, dilations = _pair(strides), _pair(dilation_rate)
    kernel_size = kernel.shape[:2]
    if isinstance(padding, str) and padding.lower() == "same":
        shape = ops.shape(inputs)
        pads = []
        for axis in range(2):
            reach = (kernel_size[axis] - 1) * dilations[axis] + 1
            size, stride = shape[1 + axis], strides[axis]
            outputs = (size + stride - 1) // stride
            total = (outputs - 1) * stride + reach - size
            total = max(total, 0) if isinstance(total, int) else ops.maximum(total, 0)
            pads.append((total // 2, total - total // 2))
        inputs = _pad(inputs, pads)
    elif not isinstance(padding, str):
        inputs = _pad(inputs, padding)
    if max(strides) > 1 and max(dilations) > 1:
        outputs = ops.conv(inputs, kernel, 1, "valid", "channels_last", dilations)
        return outputs[:, :: strides[0], :: strides[1], :]
    return ops.conv(inputs, kernel, strides, "valid", "channels_last", dilations)


def _pad(inputs, pads):
    """Adds rows and columns of zeros; their numbers may be known at run time only."""
    (top, bottom), (left, right) = pads
    batch, height, width, channels = ops.shape(inputs)
    rows = [ops.zeros((batch, n, width, channels), inputs.dtype) for n in (top, bottom)]
    inputs = ops.concatenate([rows[0], inputs, rows[1]], axis=1)
    height = height + top + bottom
    columns = [ops.zeros((batch, height, n, channels), inputs.dtype) for n in (left, right)]
    return ops.concatenate([columns[0], inputs, columns[1]], axis=2)


def _finish(outputs, bias, residual, activation):
    if bias is not None:
        outputs = outputs + ops.cast(ops.convert_to_tensor(bias), "float32")
    if residual is not None:
        outputs = outputs + ops.cast(ops.convert_to_tensor(residual), "float32")
    return {"relu": ops.relu, "relu6": ops.relu6}.get(activation, lambda x: x)(outputs)


def connection_kernel(filter, row_splits, input_channels, in_channels):
    """Returns the dense HWIO kernel of a connection table.

    Args:
        filter: Tensor of shape `(connections, kernel_height, kernel_width)`.
        row_splits: Tensor of shape `(out_channels + 1,)`.
        input_channels: Tensor of shape `(connections,)`.
        in_channels: Integer.

    Returns:
        Tensor of shape `(kernel_height, kernel_width, in_channels, out_channels)`.
    """
    connections, kernel_height, kernel_width = ops.shape(filter)
    out_channels = ops.shape(row_splits)[0] - 1
    # The output channel of connection c: how many rows end at or before it.
    ends = ops.cast(row_splits[1:], "int32")
    order = ops.arange(connections, dtype="int32")
    output_channels = ops.sum(ops.cast(order[:, None] >= ends[None, :], "int32"), axis=1)
    rows = ops.cast(input_channels, "int32") * out_channels + output_channels
    flat = ops.reshape(filter, (connections, kernel_height * kernel_width))
    dense = ops.scatter(rows[:, None], flat, (in_channels * out_channels, kernel_height * kernel_width))
    dense = ops.reshape(dense, (in_channels, out_channels, kernel_height, kernel_width))
    return ops.transpose(dense, (2, 3, 0, 1))


def thinned_kernel(filter, indices, kernel_size, in_channels):
    """Returns the dense HWIO kernel of a thinned filter.

    Args:
        filter: Tensor of shape `(kept, out_channels)`.
        indices: Tensor of shape `(kept,)`.
        kernel_size: Pair of integers.
        in_channels: Integer.

    Returns:
        Tensor of shape `(kernel_height, kernel_width, in_channels, out_channels)`.
    """
    out_channels = ops.shape(filter)[1]
    rows = kernel_size[0] * kernel_size[1] * in_channels
    dense = ops.scatter(ops.cast(indices, "int32")[:, None], filter, (rows, out_channels))
    return ops.reshape(dense, (*kernel_size, in_channels, out_channels))


def connection_conv2d(
    inputs,
    filter,
    row_splits,
    input_channels,
    strides=1,
    padding="valid",
    dilation_rate=1,
    bias=None,
    residual=None,
    activation=None,
    pool_size=1,
):
    """`keras_sparse.ops.connection_conv2d` by way of the dense kernel."""
    inputs, filter = ops.convert_to_tensor(inputs), ops.convert_to_tensor(filter)
    row_splits = ops.convert_to_tensor(row_splits, "int32")
    input_channels = ops.convert_to_tensor(input_channels, "int32")
    kernel = connection_kernel(ops.cast(filter, "float32"), row_splits, input_channels, inputs.shape[-1])
    outputs = _conv2d(ops.cast(inputs, "float32"), kernel, strides, padding, dilation_rate)
    outputs = _finish(outputs, bias, residual, activation)
    if pool_size > 1:
        outputs = ops.max_pool(outputs, pool_size, padding="valid", data_format="channels_last")
    return ops.cast(outputs, inputs.dtype)


def thinned_conv2d(
    inputs,
    filter,
    indices,
    kernel_size,
    strides=1,
    padding="valid",
    dilation_rate=1,
    bias=None,
    residual=None,
    activation=None,
):
    """`keras_sparse.ops.thinned_conv2d` by way of the dense kernel."""
    inputs, filter = ops.convert_to_tensor(inputs), ops.convert_to_tensor(filter)
    kernel = thinned_kernel(
        ops.cast(filter, "float32"),
        ops.convert_to_tensor(indices, "int32"),
        _pair(kernel_size),
        inputs.shape[-1],
    )
    outputs = _conv2d(ops.cast(inputs, "float32"), kernel, strides, padding, dilation_rate)
    return ops.cast(_finish(outputs, bias, residual, activation), inputs.dtype)
