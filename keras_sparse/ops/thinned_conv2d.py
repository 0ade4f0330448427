# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""Convolution whose kernel keeps some rows of the lowered matrix."""

import tensorflow as tf

from keras_sparse.ops import arguments, library, reference


def thinned_conv2d(
    inputs,
    filter,
    indices,
    kernel_size,
    strides=1,
    padding="valid",
    dilation_rate=1,
    data_format="channels_last",
    bias=None,
    residual=None,
    activation=None,
):
    """2D convolution with a thinned kernel.

    Lowering turns a convolution into a product with the kernel as a matrix of
    `kernel_height * kernel_width * in_channels` rows, one for each tap of each input channel. When
    whole groups of weights (all output channels at one tap of one input channel) are pruned, rows
    vanish and the matrices become thinner. Only the kept rows are given:

    ```
    indices[k] = (i * kernel_width + j) * in_channels + s
    outputs[n, y, x, o] = sum over k of
        filter[k, o] * inputs[n, y * sh + i * dh - top, x * sw + j * dw - left, s]
    ```

    where pixels outside the image are zero. This is the convolution of Lebedev and Lempitsky, "Fast
    ConvNets Using Group-wise Brain Damage" (2016), section 3; the lowered matrix itself is never
    formed here.

    Args:
        inputs: Float tensor of shape `(batch, height, width, in_channels)`. float16 and bfloat16
            are computed in float32.
        filter: Float tensor of shape `(kept, out_channels)`: the kept rows of the HWIO kernel
            reshaped to `(kernel_height * kernel_width * in_channels, out_channels)`.
        indices: int32 tensor of shape `(kept,)`: which rows they are, strictly increasing.
        kernel_size: Integer, or pair (height, width).
        strides: Integer, or pair (height, width).
        padding: `"valid"`, `"same"` (TensorFlow's rule) or `((top, bottom), (left, right))`.
        dilation_rate: Integer, or pair (height, width). May be above 1 together with `strides`.
        data_format: Must be `"channels_last"`.
        bias: Float tensor of shape `(out_channels,)`, added to the convolution.
        residual: Float tensor of the shape of the output, added as well, as at the end of a residual
            block.
        activation: `None` (or `"linear"`), `"relu"` or `"relu6"`, applied last. With any of these three
            the result is `activation(convolution + bias + residual)`, computed in the same pass.

    Returns:
        Tensor of shape `(batch, out_height, out_width, out_channels)` and of the dtype of `inputs`.
        Differentiable, to any order, with respect to `inputs`, `filter`, `bias` and
        `residual`.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument breaks a rule above, as far as its value is known.
        tf.errors.InvalidArgumentError: If values only known at run time do.
    """
    attributes = arguments.attributes(strides, padding, dilation_rate, data_format)
    kernel_size = arguments.pair("kernel_size", kernel_size)
    inputs = arguments.float_tensor("inputs", inputs, 4, tf.float32)
    filter = arguments.float_tensor("filter", filter, 2, inputs.dtype)
    indices = arguments.int_tensor("indices", indices)
    arguments.equal_sizes(
        "`filter` must have as many rows as `indices` has values",
        arguments.size(filter, 0),
        arguments.size(indices, 0),
    )
    arguments.image_fits(inputs, kernel_size, attributes)
    arguments.check_indices(indices, kernel_size, arguments.size(inputs, 3))

    epilogue = arguments.epilogue(
        bias, residual, activation, inputs, kernel_size, arguments.size(filter, 1), attributes
    )

    ops = library.load()
    if ops is None:
        return reference.thinned_conv2d(
            inputs,
            filter,
            indices,
            kernel_size,
            strides,
            padding,
            dilation_rate,
            bias=epilogue.bias,
            residual=epilogue.residual,
            activation=epilogue.activation,
        )
    operands = (tf.cast(inputs, tf.float32), tf.cast(filter, tf.float32), indices)
    options = {"kernel_size": list(kernel_size), **attributes.op_attributes()}
    if epilogue.is_needed:
        outputs = ops.keras_sparse_fused_thinned_conv2d(
            *operands, *epilogue.op_inputs(), activation=epilogue.activation, **options
        )
    else:
        outputs = ops.keras_sparse_thinned_conv2d(*operands, **options)
    return tf.cast(outputs, inputs.dtype)
