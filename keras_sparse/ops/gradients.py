# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""Gradients of the compiled ops.

A convolution is linear in its input and in its filter, so the gradient of each of the three ops of
a storage format is computed by the other two: with the forward op f(x, w), the gradient of
`BackpropInput(w, g)` with respect to w is `BackpropFilter(x', g)` and with respect to g is
`f(x', w)`, where x' is the incoming gradient. Gradients of any order follow.

The fused ops put `activation(... + bias + residual)` around a convolution. The derivatives of their activations follow
from the output; what passes the activation is the gradient of the residual, its sum over all pixels that of the bias.
"""

import tensorflow as tf

from keras_sparse.ops import library

_ATTRIBUTES = ("strides", "dilations", "padding", "explicit_paddings")


def _attributes(op):
    values = {name: op.get_attr(name) for name in _ATTRIBUTES}
    values["padding"] = tf.compat.as_str(values["padding"])
    return values


def _filter_kernel_size(filter):
    """The kernel size of a connection filter; `kernel_size` is an attribute, hence static."""
    kernel_size = filter.shape[1:3].as_list() if filter.shape.rank == 3 else [None]
    if None in kernel_size:
        raise ValueError(
            f"The gradient of connection_conv2d needs a `filter` of static kernel size, received shape {filter.shape}"
        )
    return kernel_size


def _connection_conv2d(op, gradient):
    inputs, filter, row_splits, input_channels = op.inputs[:4]  # A fused op has more.
    attributes = _attributes(op)
    ops = library.load()
    return (
        ops.keras_sparse_connection_conv2d_backprop_input(
            tf.shape(inputs), filter, row_splits, input_channels, gradient, **attributes
        ),
        ops.keras_sparse_connection_conv2d_backprop_filter(
            inputs,
            row_splits,
            input_channels,
            gradient,
            kernel_size=_filter_kernel_size(filter),
            **attributes,
        ),
        None,
        None,
    )


def _before_activation(op, gradient, outputs):
    """The gradient of a fused op with respect to `convolution + bias + residual`; `outputs` are those activated."""
    activation = tf.compat.as_str(op.get_attr("activation"))
    if activation == "relu":
        return tf.raw_ops.ReluGrad(gradients=gradient, features=outputs)
    if activation == "relu6":
        return tf.raw_ops.Relu6Grad(gradients=gradient, features=outputs)
    return gradient


def _bias_gradients(op, gradient):
    """That of the bias, if the op has one."""
    return [tf.reduce_sum(gradient, (0, 1, 2))] * op.get_attr("num_bias")


def _epilogue_gradients(op, gradient):
    """Those of the bias and the residual, as far as the op has them."""
    return (*_bias_gradients(op, gradient), *[gradient] * op.get_attr("num_residual"))


def _fused(of_convolution):
    """The gradient of a fused op, given that of its convolution."""

    def of_fused(op, gradient):
        gradient = _before_activation(op, gradient, op.outputs[0])
        return *of_convolution(op, gradient), *_epilogue_gradients(op, gradient)

    return of_fused


def _max_pooled_connection_conv2d(op, gradient):
    # What was pooled is computed again: keeping it is what the op is there to spare.
    size = op.get_attr("pool_size")
    whole = library.load().keras_sparse_fused_connection_conv2d(
        *op.inputs[:4],
        list(op.inputs[4:]),
        [],
        activation=tf.compat.as_str(op.get_attr("activation")),
        **_attributes(op),
    )
    square = (1, size, size, 1)
    gradient = tf.raw_ops.MaxPoolGrad(
        orig_input=whole, orig_output=op.outputs[0], grad=gradient, ksize=square, strides=square, padding="VALID"
    )
    gradient = _before_activation(op, gradient, whole)
    return *_connection_conv2d(op, gradient), *_bias_gradients(op, gradient)


def _connection_conv2d_backprop_input(op, gradient):
    _, filter, row_splits, input_channels, out_backprop = op.inputs
    attributes = _attributes(op)
    ops = library.load()
    return (
        None,
        ops.keras_sparse_connection_conv2d_backprop_filter(
            gradient,
            row_splits,
            input_channels,
            out_backprop,
            kernel_size=_filter_kernel_size(filter),
            **attributes,
        ),
        None,
        None,
        ops.keras_sparse_connection_conv2d(gradient, filter, row_splits, input_channels, **attributes),
    )


def _connection_conv2d_backprop_filter(op, gradient):
    inputs, row_splits, input_channels, out_backprop = op.inputs
    attributes = _attributes(op)
    ops = library.load()
    return (
        ops.keras_sparse_connection_conv2d_backprop_input(
            tf.shape(inputs), gradient, row_splits, input_channels, out_backprop, **attributes
        ),
        None,
        None,
        ops.keras_sparse_connection_conv2d(inputs, gradient, row_splits, input_channels, **attributes),
    )


def _thinned_attributes(op):
    return {**_attributes(op), "kernel_size": op.get_attr("kernel_size")}


def _thinned_conv2d(op, gradient):
    inputs, filter, indices = op.inputs[:3]  # A fused op has more.
    attributes = _thinned_attributes(op)
    ops = library.load()
    return (
        ops.keras_sparse_thinned_conv2d_backprop_input(tf.shape(inputs), filter, indices, gradient, **attributes),
        ops.keras_sparse_thinned_conv2d_backprop_filter(inputs, indices, gradient, **attributes),
        None,
    )


def _thinned_conv2d_backprop_input(op, gradient):
    _, filter, indices, out_backprop = op.inputs
    attributes = _thinned_attributes(op)
    ops = library.load()
    return (
        None,
        ops.keras_sparse_thinned_conv2d_backprop_filter(gradient, indices, out_backprop, **attributes),
        None,
        ops.keras_sparse_thinned_conv2d(gradient, filter, indices, **attributes),
    )


def _thinned_conv2d_backprop_filter(op, gradient):
    inputs, indices, out_backprop = op.inputs
    attributes = _thinned_attributes(op)
    ops = library.load()
    return (
        ops.keras_sparse_thinned_conv2d_backprop_input(tf.shape(inputs), gradient, indices, out_backprop, **attributes),
        None,
        ops.keras_sparse_thinned_conv2d(inputs, gradient, indices, **attributes),
    )


def register():
    """Registers the gradients; called once, when the package is imported."""
    for name, function in (
        ("ConnectionConv2D", _connection_conv2d),
        ("FusedConnectionConv2D", _fused(_connection_conv2d)),
        ("MaxPooledConnectionConv2D", _max_pooled_connection_conv2d),
        ("ConnectionConv2DBackpropInput", _connection_conv2d_backprop_input),
        ("ConnectionConv2DBackpropFilter", _connection_conv2d_backprop_filter),
        ("ThinnedConv2D", _thinned_conv2d),
        ("FusedThinnedConv2D", _fused(_thinned_conv2d)),
        ("ThinnedConv2DBackpropInput", _thinned_conv2d_backprop_input),
        ("ThinnedConv2DBackpropFilter", _thinned_conv2d_backprop_filter),
    ):
        tf.RegisterGradient(f"KerasSparse>{name}")(function)
