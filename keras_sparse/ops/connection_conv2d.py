# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""Convolution whose kernel is a table of connections."""

import tensorflow as tf

from keras_sparse.ops import arguments, library, reference


def connection_conv2d(
    inputs,
    filter,
    row_splits,
    input_channels,
    strides=1,
    padding="valid",
    dilation_rate=1,
    data_format="channels_last",
    bias=None,
    residual=None,
    activation=None,
    pool_size=1,
):
    """2D convolution over a connection table.

    A connection is one (input channel, output channel) pair and its `kernel_height x kernel_width`
    taps. The table names the kept pairs in compressed form, by output channel: with
    `C(o) = {row_splits[o], ..., row_splits[o + 1] - 1}`,

    ```
    outputs[n, y, x, o] = sum over c in C(o), i, j of
        filter[c, i, j] * inputs[n, y * sh + i * dh - top, x * sw + j * dw - left, s(c)]
    ```

    where `s(c) = input_channels[c]` and pixels outside the image are zero. Work and storage are
    proportional to the number of connections.

    Connection tables are those of Changpinyo, Sandler and Zhmoginov, "The Power of Sparsity in
    Convolutional Neural Networks" (2017). A grouped or depthwise convolution is a table as well:
    channel indices are absolute.

    Args:
        inputs: Float tensor of shape `(batch, height, width, in_channels)`. float16 and bfloat16
            are computed in float32.
        filter: Float tensor of shape `(connections, kernel_height, kernel_width)`, in the order of
            the table.
        row_splits: int32 tensor of shape `(out_channels + 1,)`. Starts with 0, does not decrease,
            and ends with the number of connections. Output channels may be empty.
        input_channels: int32 tensor of shape `(connections,)`. Strictly increasing within an output
            channel.
        strides: Integer, or pair (height, width).
        padding: `"valid"`, `"same"` (TensorFlow's rule) or `((top, bottom), (left, right))`.
        dilation_rate: Integer, or pair (height, width). May be above 1 together with `strides`.
        data_format: Must be `"channels_last"`.
        bias: Float tensor of shape `(out_channels,)`, added to the convolution.
        residual: Float tensor of the shape of the output, added as well, as at the end of a residual
            block.
        activation: `None` (or `"linear"`), `"relu"` or `"relu6"`, applied last. With any of these three
            the result is `activation(convolution + bias + residual)`, computed in the same pass.
        pool_size: Integer. Above 1, without a `residual`, max pooling follows in the same pass: the largest value
            of each square of `pool_size x pool_size` pixels, as `keras.layers.MaxPooling2D(pool_size)` finds it.

    Returns:
        Tensor of shape `(batch, out_height // pool_size, out_width // pool_size, out_channels)` and of the dtype of
        `inputs`.
        Differentiable, to any order, with respect to `inputs`, `filter`, `bias` and
        `residual`.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument breaks a rule above, as far as its value is known.
        tf.errors.InvalidArgumentError: If values only known at run time do.
    """
    attributes = arguments.attributes(strides, padding, dilation_rate, data_format)
    inputs = arguments.float_tensor("inputs", inputs, 4, tf.float32)
    filter = arguments.float_tensor("filter", filter, 3, inputs.dtype)
    row_splits = arguments.int_tensor("row_splits", row_splits)
    input_channels = arguments.int_tensor("input_channels", input_channels)
    if arguments.size(row_splits, 0) == 0:
        raise ValueError("`row_splits` must have out_channels + 1 values, received 0")
    arguments.equal_sizes(
        "`filter` must have as many connections as `input_channels` has values",
        arguments.size(filter, 0),
        arguments.size(input_channels, 0),
    )
    kernel_size = (arguments.size(filter, 1), arguments.size(filter, 2))
    if 0 in kernel_size:
        raise ValueError(f"`filter` must have a kernel height and width of at least 1, received {filter.shape}")
    out_channels = arguments.size(row_splits, 0)
    out_channels = None if out_channels is None else out_channels - 1
    arguments.image_fits(inputs, kernel_size, attributes)
    arguments.check_table(row_splits, input_channels, arguments.size(inputs, 3))

    epilogue = arguments.epilogue(bias, residual, activation, inputs, kernel_size, out_channels, attributes)
    pool_size = arguments.pool_size(pool_size, residual)

    ops = library.load()
    if ops is None:
        return reference.connection_conv2d(
            inputs,
            filter,
            row_splits,
            input_channels,
            strides,
            padding,
            dilation_rate,
            bias=epilogue.bias,
            residual=epilogue.residual,
            activation=epilogue.activation,
            pool_size=pool_size,
        )
    operands = (tf.cast(inputs, tf.float32), tf.cast(filter, tf.float32), row_splits, input_channels)
    options = attributes.op_attributes()
    if pool_size > 1:
        bias, _ = epilogue.op_inputs()
        outputs = ops.keras_sparse_max_pooled_connection_conv2d(
            *operands, bias, activation=epilogue.activation, pool_size=pool_size, **options
        )
    elif epilogue.is_needed:
        outputs = ops.keras_sparse_fused_connection_conv2d(
            *operands, *epilogue.op_inputs(), activation=epilogue.activation, **options
        )
    else:
        outputs = ops.keras_sparse_connection_conv2d(*operands, **options)
    return tf.cast(outputs, inputs.dtype)
