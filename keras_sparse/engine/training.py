"""Convolutions of layers in training: the sparse routines where they win at the density of the moment, dense elsewhere.

All is part of the traced graph and follows from the mask itself: the table, the density, the choice. So a mask may be
assigned by anyone at any time, from a file or a checkpoint as well, and neither is anything traced again nor can
anything be out of date. Deriving the table costs little beside a convolution that is worth running sparse.
"""

import math

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from keras_sparse import ops

__all__ = ["break_even", "convolve", "is_supported"]

# A step of training of a layer, forward and backward, takes, as a multiple of the dense convolution's time, about
#
#     planes * (1 / in_channels + 1 / out_channels) / taps + fixed / pixels + density * (product + packing / pixels)
#
# `planes`: inputs and outputs change their layout; `fixed`: the table is derived from the mask, the gradient is put
# into a kernel of zeros; `product`: multiply-adds cost more than in a dense product; `packing`: the filter is gathered
# from the kernel, its gradient scattered, once a step; `strided`: what strides multiply the last two by. Read off the
# CPU times of 38 layers of 3 to 1024 channels on 64 to 12544 pixels, densities 0.05 to 1, one thread of an AVX-512
# machine, and rounded towards the dense convolution; those of 3x3 kernels without strides, whose multiply-adds minimal
# filtering halves, off whole steps at densities 0.5 to 1 (benchmarks/training.py). They are constants, rather than
# timed when a model is built, so that a training run can be repeated.
_COSTS = {
    "connection": {"planes": 4.0, "fixed": 30.0, "product": 1.5, "packing": 250.0, "strided": (2.0, 4.0)},
    "connection_3x3": {"planes": 4.0, "fixed": 30.0, "product": 1.15, "packing": 250.0, "strided": (2.0, 4.0)},
    "connection_1x1": {"planes": 8.0, "fixed": 60.0, "product": 2.2, "packing": 2000.0, "strided": (2.0, 4.0)},
    "thinned": {"planes": 1.0, "fixed": 0.0, "product": 1.6, "packing": 60.0, "strided": (1.0, 1.0)},
}


def is_supported(inputs):
    """Return whether `convolve` can compute on these inputs where this is called: in float32, on CPUs, outside XLA."""
    if not isinstance(inputs, tf.Tensor) or inputs.dtype != tf.float32:
        return False
    if any(device.device_type != "CPU" for device in tf.config.get_visible_devices()):
        return False
    # Within `jit_compile=True`, which knows TensorFlow's own ops only.
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    return graph is None or not control_flow_util.GraphOrParentsInXlaContext(graph)


def break_even(kernel_shape, pixels, strided=False, thinned=False):
    """Return the density below which a step of training is faster with the sparse routines.

    Args:
        kernel_shape: `(kernel_height, kernel_width, in_channels, out_channels)`.
        pixels: Output pixels of a step, over all images of the batch; a number or a tensor.
        strided: Whether any stride is above 1.
        thinned: Whether whole rows of the lowered kernel are pruned, rather than connections.

    Returns:
        A number, or a tensor where `pixels` is one. At most 0: the sparse routines win at no density.
    """
    taps = math.prod(kernel_shape[:2])
    # What ConnectionConv2DWinograd takes, forward and backward.
    filtering = tuple(kernel_shape[:2]) == (3, 3) and not strided and min(kernel_shape[2:]) >= 16
    kind = "connection_1x1" if taps == 1 else "connection_3x3" if filtering else "connection"
    costs = _COSTS["thinned" if thinned else kind]
    planes = costs["planes"] * sum(1 / channels for channels in kernel_shape[2:]) / taps
    product, packing = (
        costs[name] * (factor if strided else 1.0) for name, factor in zip(("product", "packing"), costs["strided"])
    )
    return (1.0 - planes - costs["fixed"] / pixels) / (product + packing / pixels)


def convolve(
    inputs, kernel, mask, dense, finish, execution="auto", strides=(1, 1), padding="valid", dilation_rate=(1, 1)
):
    """Return what a layer makes of `inputs` with a kernel that is zero where its mask is, differentiable.

    Args:
        inputs: float32 tensor, NHWC.
        kernel: float32 tensor, the effective kernel, HWIO.
        mask: Tensor that broadcasts to the kernel.
        dense: Function of `inputs` and `kernel` that computes the same densely.
        finish: What the layer does to the product, bias and activation. TensorFlow fuses these into its dense
            convolution, so that they have to be in the same branch.
        execution: `"auto"` chooses at each step by the density of the mask; `"sparse"` does not.
        strides: Pair.
        padding: `"valid"` or `"same"`.
        dilation_rate: Pair.
    """
    # Masks that say nothing about single outputs prune rows of the lowered kernel.
    thinned = mask.shape[3] == 1
    kept = _any(mask, (3,) if thinned else (0, 1))
    product = _thinned if thinned else _connection
    options = {"strides": strides, "padding": padding, "dilation_rate": dilation_rate}
    if execution == "sparse":
        return finish(product(inputs, kernel, kept, options))
    shape, strided = tuple(kernel.shape), max(strides) > 1
    if break_even(shape, math.inf, strided, thinned) <= 0:
        return finish(dense(inputs, kernel))
    pixels = _output_pixels(inputs, shape[:2], **options)
    limit = tf.cast(break_even(shape, pixels, strided, thinned), tf.float32)
    density = tf.reduce_mean(tf.cast(kept, tf.float32))
    return tf.cond(
        density < limit,
        lambda: finish(product(inputs, kernel, kept, options)),
        lambda: finish(dense(inputs, kernel)),
    )


def _any(mask, axes):
    """Return where the mask keeps anything along the axes, which vanish."""
    if all(mask.shape[axis] == 1 for axis in axes):  # a reduction of nothing takes its time
        return tf.squeeze(mask, axes) != 0
    return tf.reduce_any(mask != 0, axes)


def _connection(inputs, kernel, kept, options):
    """The product over the connections of which any weight is kept; `kept` broadcasts to (in, out)."""
    height, width, channels, filters = kernel.shape
    # By output, then input: the order of the table.
    outputs_and_inputs = tf.cast(tf.where(tf.broadcast_to(tf.transpose(kept), (filters, channels))), tf.int32)
    of_output, of_input = outputs_and_inputs[:, 0], outputs_and_inputs[:, 1]
    row_splits = tf.searchsorted(of_output, tf.range(filters + 1))
    connections = tf.transpose(tf.reshape(kernel, (height * width, channels * filters)))
    filter = tf.reshape(tf.gather(connections, of_input * filters + of_output), (-1, height, width))
    return ops.connection_conv2d(inputs, filter, row_splits, of_input, **options)


def _thinned(inputs, kernel, kept, options):
    """The product over the rows of the lowered kernel that are kept; `kept` broadcasts to (height, width, in)."""
    height, width, channels, filters = kernel.shape
    rows = tf.reshape(tf.broadcast_to(kept, (height, width, channels)), (-1,))
    indices = tf.cast(tf.where(rows)[:, 0], tf.int32)
    filter = tf.gather(tf.reshape(kernel, (height * width * channels, filters)), indices)
    return ops.thinned_conv2d(inputs, filter, indices, (height, width), **options)


def _output_pixels(inputs, kernel_size, strides, padding, dilation_rate):
    """Return how many positions of all images the kernel is applied to, as a number if the sizes are known."""
    sizes = [d if d is not None else tf.shape(inputs)[i] for i, d in enumerate(inputs.shape[:3])]
    outputs = [sizes[0]]
    for size, taps, stride, dilation in zip(sizes[1:], kernel_size, strides, dilation_rate):
        lost = (taps - 1) * dilation if padding == "valid" else 0
        outputs.append((size - lost + stride - 1) // stride)
    numbers = all(isinstance(size, int) for size in outputs)
    pixels = math.prod(outputs) if numbers else tf.reduce_prod(tf.cast(tf.stack(outputs), tf.float32))
    return max(pixels, 1) if numbers else tf.maximum(pixels, 1.0)
