import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_sparse.engine import inference


def windows(images, pool_size, strides, padding):
    """Max pooling in NumPy float64: padding counts as lower than anything, and a NaN as if it were not there."""
    images = np.where(np.isnan(images), -np.inf, images).astype("float64")
    if padding == "same":
        totals = [max(0, (-(-n // s) - 1) * s + k - n) for n, k, s in zip(images.shape[1:3], pool_size, strides)]
        pads = [(0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)]
        images = np.pad(images, pads, constant_values=-np.inf)
    view = np.lib.stride_tricks.sliding_window_view(images, pool_size, axis=(1, 2))
    lowest = np.finfo("float32").min
    return np.maximum(view[:, :: strides[0], :: strides[1]].max((-2, -1)), lowest)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    ("pool_size", "strides", "shape"),
    [((2, 2), None, (2, 9, 7, 5)), ((3, 3), (2, 2), (3, 9, 8, 4)), ((2, 3), (1, 4), (1, 3, 11, 17))],
)
def test_pooling_per_image_equals_the_layer(pool_size, strides, padding, shape):
    layer = keras.layers.MaxPooling2D(pool_size, strides, padding)
    copy = inference.POOLINGS["per_image"](layer)
    assert type(copy) is inference.PerImageMaxPooling2D and copy.name == layer.name
    generator = np.random.default_rng(0)
    images = generator.standard_normal(shape).astype("float32")
    strange = images.copy()
    strange[generator.random(shape) < 0.5] = np.nan  # whole windows of them
    strange[generator.random(shape) < 0.5] = -np.inf
    strange[generator.random(shape) < 0.02] = np.inf
    both = tf.function(lambda x: (layer(x), copy(x)))
    for values in (images, strange, np.full_like(images, -np.inf)):
        own, per_image = both(values)
        np.testing.assert_array_equal(per_image, own)
        np.testing.assert_array_equal(per_image, windows(values, pool_size, strides or pool_size, padding))
    assert copy.compute_output_shape(shape) == tuple(per_image.shape)
    assert copy(keras.Input((None, None, shape[-1]))).shape == (None, None, None, shape[-1])
