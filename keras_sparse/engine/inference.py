"""Layers of an exported graph: a routine on constants in place of a layer with zeros in its kernel."""

import keras
import tensorflow as tf

from keras_sparse.engine.routines import Convolution

__all__ = [
    "POOLINGS",
    "InferenceConv2D",
    "InferenceDense",
    "PassThrough",
    "PerImageMaxPooling2D",
    "convolution_of",
    "inference_layer",
]


def convolution_of(layer, kernel, bias, padding=None, activation="linear", pool_size=1):
    """Return the `Convolution` that a Conv2D or Dense layer, sparse or plain, computes, in NHWC.

    Args:
        layer: The layer.
        kernel: Array to take for that of the layer.
        bias: The same, or `None`.
        padding: Pixels `((top, bottom), (left, right))` of zeros that a layer without padding is to add itself.
        activation: `"linear"`, `"relu"` or `"relu6"`, to follow.
        pool_size: Side of the squares of a max pooling behind that.
    """
    if isinstance(layer, keras.layers.Dense):
        return Convolution(kernel[None, None], is_dense_layer=True, bias=bias, activation=activation)
    return Convolution(
        kernel,
        strides=layer.strides,
        padding=layer.padding if padding is None else padding,
        dilation_rate=layer.dilation_rate,
        groups=layer.groups,
        bias=bias,
        activation=activation,
        pool_size=pool_size,
    )


def inference_layer(layer, routine, name=None, activation=None, padding=None, position=0, pooling=None):
    """Return the unbuilt layer that computes what `layer` and those around it compute, by `routine`.

    Args:
        layer: The Conv2D or Dense layer.
        routine: What a `Convolution` was built into.
        name: The new layer's name, by default that of `layer`.
        activation: A function to follow the routine, where the routine has none.
        padding: As in `convolution_of`.
        position: Where the layer's own input is, should it be called with a list of that and a residual.
        pooling: The `MaxPooling2D` that the routine computes as well, or `None`.
    """
    cls = InferenceDense if isinstance(layer, keras.layers.Dense) else InferenceConv2D
    return cls(layer, routine, name or layer.name, activation, padding, position, pooling)


class _Inference(keras.layers.Layer):
    """A routine in the place of a layer. Lives only while a model is exported."""

    def __init__(self, layer, routine, name, activation, padding, position, pooling):
        super().__init__(name=name, dtype=layer.dtype_policy, trainable=False)
        self._routine = routine
        self._activation = activation
        self._padding = padding or ((0, 0), (0, 0))
        self._position = position
        self._data_format = getattr(layer, "data_format", None)
        self._output_shape_of = layer.compute_output_shape
        self._pooled_shape_of = (lambda shape: shape) if pooling is None else pooling.compute_output_shape
        self.supports_jit = False

    def compute_output_shape(self, input_shape):
        if isinstance(input_shape, list):
            input_shape = input_shape[self._position]
        shape = list(input_shape)
        for pads, axis in zip(self._padding, (2, 3) if self._data_format == "channels_first" else (1, 2)):
            if sum(pads) and shape[axis] is not None:
                shape[axis] += sum(pads)
        return self._pooled_shape_of(self._output_shape_of(tuple(shape)))

    def call(self, inputs, **unused):
        inputs, residual = inputs if isinstance(inputs, (list, tuple)) else (inputs, None)
        if self._position == 1:
            inputs, residual = residual, inputs
        outputs = self._compute(inputs, residual)
        return outputs if self._activation is None else self._activation(outputs)


class PassThrough(keras.layers.Layer):
    """What is left of a layer that another one computes."""

    def __init__(self, layer):
        super().__init__(name=layer.name, dtype=layer.dtype_policy, trainable=False)

    def compute_output_shape(self, input_shape):
        return input_shape

    # The arguments a layer may have been called with. Named: Keras 3.12 takes those behind a `**` for tensors.
    def call(self, inputs, training=None, mask=None):
        return inputs


class PerImageMaxPooling2D(keras.layers.MaxPooling2D):
    """Max pooling by TensorFlow's kernel that shares the work out by whole images.

    `MaxPool`, which Keras calls, is run by oneDNN where TensorFlow has that, and oneDNN cuts each image up for all
    threads: in a small batch, waking them takes longer than the pooling. `MaxPoolV2`, which takes its sizes as
    tensors, oneDNN leaves alone. Their results are the same, also that neither hands on a NaN, and that the lowest
    finite number stands for a window of -inf.
    """

    def call(self, inputs):
        return tf.raw_ops.MaxPoolV2(
            input=inputs, ksize=(1, *self.pool_size, 1), strides=(1, *self.strides, 1), padding=self.padding.upper()
        )


# The ways an exported max pooling can run, each a function of the layer: by TensorFlow's own choice, or per image.
POOLINGS = {
    "dense": lambda layer: layer,
    "per_image": lambda layer: PerImageMaxPooling2D.from_config(layer.get_config()),
}


class InferenceConv2D(_Inference):
    """A convolution by a routine, which works in NHWC."""

    def _compute(self, inputs, residual):
        if self._data_format != "channels_first":
            return self._routine(inputs, residual)
        if residual is not None:
            residual = tf.transpose(residual, (0, 2, 3, 1))
        return tf.transpose(self._routine(tf.transpose(inputs, (0, 2, 3, 1)), residual), (0, 3, 1, 2))


class InferenceDense(_Inference):
    """A dense layer by a routine, as a 1x1 convolution over a row of pixels."""

    def _compute(self, inputs, residual):
        if residual is not None:
            residual = tf.reshape(residual, (1, 1, -1, residual.shape[-1]))
        outputs = self._routine(tf.reshape(inputs, (1, 1, -1, inputs.shape[-1])), residual)
        leading = tf.shape(inputs)[:-1]
        outputs = tf.reshape(outputs, tf.concat([leading, [outputs.shape[-1]]], axis=0))
        outputs.set_shape((*inputs.shape[:-1], outputs.shape[-1]))
        return outputs
