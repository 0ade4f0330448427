"""The ways an exported layer can compute, each from the effective kernel and bias alone.

A routine is built once from constants and then maps a tensor, and a residual if there is one, to
`activation(product + bias + residual)`. `ROUTINES` is the one list that the planner, the export and the tests read.
"""

import keras
import numpy as np
import tensorflow as tf

from keras_sparse import ops
from keras_sparse.engine import packing

__all__ = ["ROUTINES", "Convolution", "build"]


class Convolution:
    """What a routine needs to know of a layer; a dense layer is a 1x1 convolution over a row of pixels.

    Args:
        kernel: Effective kernel, float32, HWIO.
        strides, dilation_rate: Pairs.
        padding: `"valid"`, `"same"` or `((top, bottom), (left, right))`.
        groups: Groups of the convolution.
        is_dense_layer: Whether this stands for a dense layer, whose dense routine is a matrix product.
        bias: Vector, or `None`.
        activation: `"linear"`, `"relu"` or `"relu6"`.
        pool_size: Side of the squares that max pooling takes the largest value of in the end, 1 for no pooling.
    """

    def __init__(
        self,
        kernel,
        strides=(1, 1),
        padding="valid",
        dilation_rate=(1, 1),
        groups=1,
        is_dense_layer=False,
        bias=None,
        activation="linear",
        pool_size=1,
    ):
        self.pool_size = pool_size
        self.bias = None if bias is None else np.asarray(bias, "float32")
        self.activation = activation
        self.kernel = np.asarray(kernel, "float32")
        self.strides = tuple(strides)
        self.padding = padding
        self.dilation_rate = tuple(dilation_rate)
        self.groups = groups
        self.is_dense_layer = is_dense_layer

    @property
    def options(self):
        return {"strides": self.strides, "padding": self.padding, "dilation_rate": self.dilation_rate}

    def fused(self, residual, dtype):
        """What our ops compute beside the product."""
        bias = None if self.bias is None else tf.constant(self.bias, dtype)
        return {"bias": bias, "residual": residual, "activation": self.activation}

    def finish(self, product, residual):
        """The same for a product of TensorFlow's, which fuses it where the graph is optimised."""
        if self.bias is not None:
            product = tf.nn.bias_add(product, tf.constant(self.bias, product.dtype))
        if residual is not None:
            product = product + residual
        return self.pool({"linear": tf.identity, "relu": tf.nn.relu, "relu6": tf.nn.relu6}[self.activation](product))

    def pool(self, outputs):
        return outputs if self.pool_size == 1 else tf.nn.max_pool2d(outputs, self.pool_size, self.pool_size, "VALID")

    def convolve(self, inputs, kernel):
        """TensorFlow's convolution with a kernel over some of the channels."""
        padding = self.padding
        if not isinstance(padding, str):
            inputs, padding = tf.pad(inputs, [(0, 0), *padding, (0, 0)]), "valid"
        kernel = tf.constant(kernel, inputs.dtype)
        return keras.ops.conv(inputs, kernel, self.strides, padding, "channels_last", self.dilation_rate)


class _Routine:
    """A function of the inputs and the residual, or `None`, with its constants, and their size as stored."""

    def __init__(self, function, nbytes):
        self._function = function
        self.nbytes = nbytes

    def __call__(self, inputs, residual=None):
        return self._function(inputs, residual)


def _dense(convolution):
    kernel = convolution.kernel

    def compute(inputs, residual):
        # Created while tracing: in the exported graph the kernel is a constant, which TensorFlow prepares once.
        if convolution.is_dense_layer:
            rows = tf.reshape(inputs, (-1, kernel.shape[2]))
            residual = None if residual is None else tf.reshape(residual, (-1, kernel.shape[3]))
            product = tf.matmul(rows, tf.constant(kernel[0, 0], inputs.dtype))
            return convolution.finish(product, residual)[None, None]
        return convolution.finish(convolution.convolve(inputs, kernel), residual)

    return _Routine(compute, kernel.nbytes)


def _connection(convolution):
    table = packing.connection_table(convolution.kernel, convolution.groups)

    def compute(inputs, residual):
        return ops.connection_conv2d(
            inputs,
            tf.constant(table.filter, inputs.dtype),
            tf.constant(table.row_splits),
            tf.constant(table.input_channels),
            **convolution.options,
            **convolution.fused(residual, inputs.dtype),
            pool_size=convolution.pool_size,
        )

    return _Routine(compute, table.nbytes)


def _thinned(convolution):
    if convolution.groups != 1:
        return None
    thinned = packing.thinned_filter(convolution.kernel)

    def compute(inputs, residual):
        outputs = ops.thinned_conv2d(
            inputs,
            tf.constant(thinned.filter, inputs.dtype),
            tf.constant(thinned.indices),
            thinned.kernel_size,
            **convolution.options,
            **convolution.fused(residual, inputs.dtype),
        )
        return convolution.pool(outputs)

    return _Routine(compute, thinned.nbytes)


def _compact(convolution):
    """The dense convolution over those channels that hold any weight."""
    kernel = convolution.kernel
    inputs_used = np.flatnonzero((kernel != 0).any(axis=(0, 1, 3)))
    outputs_used = np.flatnonzero((kernel != 0).any(axis=(0, 1, 2)))
    channels, filters = kernel.shape[2:]
    whole = inputs_used.size == channels and outputs_used.size == filters
    if convolution.groups != 1 or whole or not inputs_used.size:
        return None
    small = np.ascontiguousarray(kernel[:, :, inputs_used][..., outputs_used])
    # Output j of the layer is column position[j] of the small product, to which a column of zeros is appended.
    position = np.full(filters, outputs_used.size, "int32")
    position[outputs_used] = np.arange(outputs_used.size)

    def compute(inputs, residual):
        if inputs_used.size < channels:
            inputs = tf.gather(inputs, tf.constant(inputs_used.astype("int32")), axis=-1)
        outputs = convolution.convolve(inputs, small)
        if outputs_used.size < filters:
            outputs = tf.pad(outputs, [[0, 0], [0, 0], [0, 0], [0, 1]])
            outputs = tf.gather(outputs, tf.constant(position), axis=-1)
        return convolution.finish(outputs, residual)

    return _Routine(compute, small.nbytes + 4 * (inputs_used.size + filters))


ROUTINES = {"dense": _dense, "connection": _connection, "thinned": _thinned, "compact": _compact}


def build(name, convolution):
    """Return the routine `name` for a `Convolution`, or `None` where it does not apply."""
    return ROUTINES[name](convolution)
