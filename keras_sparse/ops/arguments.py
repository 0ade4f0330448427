# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""Checks of what callers pass to the ops. Every error names argument, rule and value received."""

import dataclasses
import numbers

import numpy as np
import tensorflow as tf

_INT_MAX = 2**31 - 1
_FLOATS = ("float32", "float16", "bfloat16")
_ACTIVATIONS = ("linear", "relu", "relu6")


@dataclasses.dataclass(frozen=True)
class Attributes:
    """How a kernel moves over the image; pairs are (height, width)."""

    strides: tuple
    dilations: tuple
    padding: str  # "SAME", "VALID" or "EXPLICIT".
    explicit_paddings: tuple  # (top, bottom, left, right), or () unless padding is EXPLICIT.

    def op_attributes(self):
        return {
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "padding": self.padding,
            "explicit_paddings": list(self.explicit_paddings),
        }


def _is_integer(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def pair(name, value):
    """Returns `value`, a positive integer or a pair of them, as a tuple (height, width)."""
    values = (value, value) if _is_integer(value) else value
    if not isinstance(values, (tuple, list)) or not all(_is_integer(v) for v in values):
        raise TypeError(f"`{name}` must be an integer or a pair of integers (height, width), received {value!r}")
    if len(values) != 2 or not all(1 <= v <= _INT_MAX for v in values):
        raise ValueError(f"`{name}` must be one or two integers between 1 and 2**31 - 1, received {value!r}")
    return tuple(int(v) for v in values)


def _padding(padding):
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(
                f'`padding` must be "valid", "same" or ((top, bottom), (left, right)), received {padding!r}'
            )
        return padding.upper(), ()
    try:
        (top, bottom), (left, right) = padding
        values = (top, bottom, left, right)
    except (TypeError, ValueError):
        values = None
    if values is None or not all(_is_integer(v) for v in values):
        raise TypeError(
            f'`padding` must be "valid", "same" or integers ((top, bottom), (left, right)), received {padding!r}'
        )
    if not all(0 <= v <= _INT_MAX for v in values):
        raise ValueError(f"`padding` must have values between 0 and 2**31 - 1, received {padding!r}")
    return "EXPLICIT", tuple(int(v) for v in values)


def attributes(strides, padding, dilation_rate, data_format):
    """Checks the arguments that say how a kernel moves; returns `Attributes`."""
    if data_format != "channels_last":
        raise ValueError(
            '`data_format` must be "channels_last": the sparse ops compute NHWC only, so transpose '
            "the inputs (`keras.ops.transpose(inputs, (0, 2, 3, 1))`) or set `data_format` of the "
            f"layer; received {data_format!r}"
        )
    name, explicit = _padding(padding)
    return Attributes(pair("strides", strides), pair("dilation_rate", dilation_rate), name, explicit)


def float_tensor(name, value, rank, dtype=None):
    """Converts `value` to a float tensor of the rank; `dtype` is what plain numbers become."""
    # Only plain numbers take the hint: an array keeps its dtype, and a wrong one is an error.
    tensor = tf.convert_to_tensor(value, dtype_hint=None if hasattr(value, "dtype") else dtype)
    if tensor.dtype.name not in _FLOATS:
        raise TypeError(f"`{name}` must be float32, float16 or bfloat16, received {tensor.dtype.name}")
    return _of_rank(name, tensor, rank)


def int_tensor(name, value):
    """Converts `value` to an int32 vector."""
    if isinstance(value, (list, tuple)) and not value:
        value = np.zeros([0], np.int32)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        if value.size and (value.min() < -_INT_MAX - 1 or value.max() > _INT_MAX):
            raise ValueError(f"`{name}` must hold 32-bit integers, received values from {value.min()} to {value.max()}")
        value = value.astype(np.int32)
    tensor = tf.convert_to_tensor(value, dtype_hint=tf.int32)
    if tensor.dtype == tf.int64:
        # Values that do not fit become negative, which every op refuses.
        tensor = tf.where((tensor < 0) | (tensor > _INT_MAX), tf.constant(-1, tf.int64), tensor)
        tensor = tf.cast(tensor, tf.int32)
    if tensor.dtype != tf.int32:
        raise TypeError(f"`{name}` must be int32 (or int64), received {tensor.dtype.name}")
    return _of_rank(name, tensor, 1)


def _of_rank(name, tensor, rank):
    if tensor.shape.rank is not None and tensor.shape.rank != rank:
        raise ValueError(f"`{name}` must have rank {rank}, received shape {tensor.shape}")
    return tensor


def equal_sizes(rule, a, b):
    """Checks two static sizes, either of which may be unknown."""
    if a is not None and b is not None and a != b:
        raise ValueError(f"{rule}, received {a} and {b}")


def size(tensor, axis):
    """The static size along an axis, or None."""
    return None if tensor.shape.rank is None else tensor.shape[axis]


def image_fits(inputs, kernel_size, attributes):
    """Checks that a kernel of static size fits into images of static size."""
    if attributes.padding == "SAME":
        return
    top, bottom, left, right = attributes.explicit_paddings or (0, 0, 0, 0)
    pads = (top + bottom, left + right)
    for axis, name in enumerate(("height", "width")):
        image, kernel = size(inputs, 1 + axis), kernel_size[axis]
        if image is None or kernel is None:
            continue
        reach = (kernel - 1) * attributes.dilations[axis] + 1
        if image + pads[axis] < reach:
            raise ValueError(
                f"`inputs` must have a padded {name} of at least the dilated kernel's {reach}, "
                f"received {image + pads[axis]}"
            )


def _output_size(image, kernel_size, attributes, axis):
    """The static size of the convolution's output along an axis of the image, or None."""
    if image is None or (attributes.padding != "SAME" and kernel_size[axis] is None):
        return None
    stride = attributes.strides[axis]
    if attributes.padding == "SAME":
        return -(-image // stride)
    before, after = (attributes.explicit_paddings or (0, 0, 0, 0))[2 * axis : 2 * axis + 2]
    reach = (kernel_size[axis] - 1) * attributes.dilations[axis] + 1
    return (image + before + after - reach) // stride + 1


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What follows the convolution: `activation(convolution + bias + residual)`."""

    bias: tf.Tensor | None
    residual: tf.Tensor | None
    activation: str

    @property
    def is_needed(self):
        return self.bias is not None or self.residual is not None or self.activation != "linear"

    def op_inputs(self):
        """The inputs of a fused op, which takes what may be missing as lists."""
        return [[] if t is None else [tf.cast(t, tf.float32)] for t in (self.bias, self.residual)]


def epilogue(bias, residual, activation, inputs, kernel_size, out_channels, attributes):
    """Checks what is to follow a convolution of checked arguments; returns an `Epilogue`."""
    activation = "linear" if activation is None else activation
    if not isinstance(activation, str):
        raise TypeError(f"`activation` must be None or one of {', '.join(_ACTIVATIONS)}, received {activation!r}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"`activation` must be None or one of {', '.join(_ACTIVATIONS)}, received {activation!r}")
    if bias is not None:
        bias = float_tensor("bias", bias, 1, inputs.dtype)
        equal_sizes("`bias` must have a value for each output channel", size(bias, 0), out_channels)
    if residual is not None:
        residual = float_tensor("residual", residual, 4, inputs.dtype)
        image = [_output_size(size(inputs, 1 + axis), kernel_size, attributes, axis) for axis in range(2)]
        shape = tf.TensorShape([size(inputs, 0), *image, out_channels])
        if not residual.shape.is_compatible_with(shape):
            raise ValueError(
                f"`residual` must have the shape of the convolution's output, {shape}, received {residual.shape}"
            )
    return Epilogue(bias, residual, activation)


def pool_size(value, residual):
    """Returns the side of the squares of a max pooling, 1 for none."""
    if not _is_integer(value):
        raise TypeError(f"`pool_size` must be an integer, received {value!r}")
    if not 1 <= value <= _INT_MAX:
        raise ValueError(f"`pool_size` must be between 1 and 2**31 - 1, received {value!r}")
    if value > 1 and residual is not None:
        raise ValueError(f"`pool_size` must be 1 where there is a `residual`, received {value!r}")
    return int(value)


def static_values(tensor):
    """The values of a tensor as a NumPy array if they are known, else None."""
    return tf.get_static_value(tensor)


def check_table(row_splits, input_channels, in_channels):
    """Checks the values of a connection table, as far as they are known."""
    splits, channels = static_values(row_splits), static_values(input_channels)
    connections = size(input_channels, 0)
    if splits is not None:
        if len(splits) < 1:
            raise ValueError("`row_splits` must have out_channels + 1 values, received 0")
        bad = splits[0] != 0 or np.any(np.diff(splits.astype(np.int64)) < 0)
        if bad or (connections is not None and splits[-1] != connections):
            raise ValueError(
                "`row_splits` must start with 0, not decrease and end with the number of "
                f"connections, {connections}; received {_short(splits)}"
            )
    if channels is None or not channels.size:
        return
    if channels.min() < 0 or (in_channels is not None and channels.max() >= in_channels):
        raise ValueError(
            "`input_channels` must be at least 0 and below the number of input channels, "
            f"{in_channels}; received values from {channels.min()} to {channels.max()}"
        )
    if splits is not None:
        steps = np.diff(channels.astype(np.int64))
        inner = np.ones(len(channels) - 1, bool)
        starts = splits[(splits > 0) & (splits < len(channels))]
        inner[starts - 1] = False
        wrong = np.flatnonzero(inner & (steps <= 0))
        if wrong.size:
            at = int(wrong[0]) + 1
            raise ValueError(
                "`input_channels` must be strictly increasing within an output channel; received "
                f"{channels[at]} after {channels[at - 1]} at position {at}"
            )


def check_indices(indices, kernel_size, in_channels):
    """Checks the values of the indices of a thinned filter, as far as they are known."""
    values = static_values(indices)
    if in_channels is not None and kernel_size[0] * kernel_size[1] * in_channels > _INT_MAX:
        raise ValueError(
            "`kernel_size` must keep kernel_height * kernel_width * in_channels below 2**31, "
            f"received {kernel_size} with {in_channels} input channels"
        )
    if values is None or not values.size:
        return
    limit = None if in_channels is None else kernel_size[0] * kernel_size[1] * in_channels
    if values.min() < 0 or (limit is not None and values.max() >= limit):
        raise ValueError(
            "`indices` must be at least 0 and below kernel_height * kernel_width * in_channels, "
            f"{limit}; received values from {values.min()} to {values.max()}"
        )
    wrong = np.flatnonzero(np.diff(values.astype(np.int64)) <= 0)
    if wrong.size:
        at = int(wrong[0]) + 1
        raise ValueError(
            f"`indices` must be strictly increasing; received {values[at]} after {values[at - 1]} at position {at}"
        )


def _short(values):
    return np.array2string(values, threshold=12, edgeitems=4)
