"""Layers of an exported graph: a routine on constants in place of a layer with zeros in its kernel."""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_sparse.engine.routines import Convolution

__all__ = ["InferenceConv2D", "InferenceDense", "convolution_of", "inference_layer", "routine_input_shape"]


def convolution_of(layer):
    """Return the `Convolution` that a Conv2D or Dense layer, sparse or plain, computes, in NHWC."""
    kernel = ops.convert_to_numpy(layer.kernel).astype("float32")
    if isinstance(layer, keras.layers.Dense):
        return Convolution(kernel[None, None], is_dense_layer=True)
    return Convolution(
        kernel,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        groups=layer.groups,
    )


def routine_input_shape(layer, call, batch_size):
    """Return the shape of the NHWC tensor that the layer's routine gets in the recorded call."""
    shape = (batch_size, *call.input_shape[1:])
    if isinstance(layer, keras.layers.Dense):
        return (1, 1, int(np.prod(shape[:-1])), shape[-1])
    if layer.data_format == "channels_first":
        return (shape[0], shape[2], shape[3], shape[1])
    return shape


def inference_layer(layer, routine):
    """Return the unbuilt layer that computes what `layer` computes, by `routine`."""
    return (InferenceDense if isinstance(layer, keras.layers.Dense) else InferenceConv2D)(layer, routine)


class _Inference(keras.layers.Layer):
    """Bias and activation of a sparse layer around a routine's product. Lives only while a model is exported."""

    def __init__(self, layer, routine):
        super().__init__(name=layer.name, dtype=layer.dtype_policy, trainable=False)
        self._routine = routine
        self._activation = layer.activation
        self._bias = None if layer.bias is None else ops.convert_to_numpy(layer.bias)
        self._output_shape_of = layer.compute_output_shape
        self.supports_jit = False

    def compute_output_shape(self, input_shape):
        return self._output_shape_of(input_shape)

    def _product(self, inputs):
        outputs = self._routine(inputs)
        if self._bias is not None:
            outputs = tf.nn.bias_add(outputs, tf.constant(self._bias, outputs.dtype))
        return outputs

    def _activate(self, outputs):
        return outputs if self._activation is None else self._activation(outputs)


class InferenceConv2D(_Inference):
    """A convolution by a routine, which works in NHWC."""

    def __init__(self, layer, routine):
        super().__init__(layer, routine)
        self._channels_first = layer.data_format == "channels_first"

    def call(self, inputs):
        if self._channels_first:
            inputs = tf.transpose(inputs, (0, 2, 3, 1))
        outputs = self._product(inputs)
        if self._channels_first:
            outputs = tf.transpose(outputs, (0, 3, 1, 2))
        return self._activate(outputs)


class InferenceDense(_Inference):
    """A dense layer by a routine, as a 1x1 convolution over a row of pixels."""

    def call(self, inputs):
        channels = inputs.shape[-1]
        outputs = self._product(tf.reshape(inputs, (1, 1, -1, channels)))
        leading = tf.shape(inputs)[:-1]
        outputs = tf.reshape(outputs, tf.concat([leading, [outputs.shape[-1]]], axis=0))
        outputs.set_shape((*inputs.shape[:-1], outputs.shape[-1]))
        return self._activate(outputs)
