"""Models whose channels meet in every way, and what their own gradients say of their connections."""

import keras
import numpy as np
from keras import layers

from keras_sparse import selection
from keras_sparse.surgery.channels import connection_table


def conv(filters, size=3, **options):
    return layers.Conv2D(filters, size, padding="same", use_bias=False, **options)


def chain():
    x = inputs = keras.Input((6, 5, 3))
    x = layers.ReLU()(layers.BatchNormalization()(conv(7, name="a")(x)))
    x = layers.MaxPooling2D()(conv(5, activation="relu", name="b")(x))
    x = layers.Dropout(0.5)(layers.ZeroPadding2D()(x))
    x = layers.Flatten()(conv(4, name="c")(x))
    return keras.Model(inputs, layers.Dense(3, use_bias=False, name="d")(x))


def residual():
    x = inputs = keras.Input((6, 5, 3))
    x = stem = conv(6, name="stem")(x)
    x = conv(6, name="b")(layers.BatchNormalization()(conv(4, name="a")(x)))
    x = x + layers.Add()([x, stem])  # an operation and a layer
    y = conv(6, name="e")(keras.ops.relu(x))
    x = layers.Average()([x, y, conv(6, 1, name="f")(stem)])
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    return keras.Model(inputs, layers.Reshape((5,))(conv(5, name="head")(x)))


def concatenation():
    x = inputs = keras.Input((6, 5, 2))
    x = layers.Concatenate()([x, conv(4, name="a")(x), conv(3, name="b")(x)])
    y = layers.Concatenate(axis=1)([conv(5, name="c")(x), conv(5, name="d")(x)])
    x = layers.Permute((2, 3, 1))(layers.AveragePooling2D(2)(y))
    x = layers.Permute((3, 1, 2))(x)
    return keras.Model(inputs, layers.Dense(3, use_bias=False, name="e")(layers.Reshape((12, 5))(layers.Flatten()(x))))


def groups():
    x = inputs = keras.Input((6, 5, 4))
    x = conv(6, groups=2, name="a")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)(x)
    x = layers.SeparableConv2D(6, 3, use_bias=False)(conv(8, groups=4, name="b")(x))
    x = layers.UpSampling2D()(conv(6, groups=6, name="c")(x))
    return keras.Model(inputs, layers.GlobalMaxPooling2D()(conv(3, name="d")(x)))


def shared():
    x = inputs = keras.Input((6, 5, 4))
    twice = conv(4, name="twice")
    norm = layers.BatchNormalization()
    x = conv(4, 1, name="between")(norm(twice(x)))
    x = norm(twice(x))
    block = keras.Sequential([keras.Input((6, 5, 4)), conv(3, name="inner"), layers.ReLU()], name="block")
    both = {"b": block(x), "a": block(layers.Add()([x, conv(4, name="other")(x)]))}
    into = {"a": keras.Input((6, 5, 3), name="a"), "b": keras.Input((6, 5, 3), name="b")}
    join = keras.Model(into, layers.Concatenate()([conv(2, name="left")(into["a"]), into["b"]]), name="join")
    return keras.Model(inputs, conv(2, name="head")(join(both)))


def unknown():
    x = inputs = keras.Input((6, 5, 3))
    x = conv(4, name="a")(x)
    x = x[..., ::-1]  # an operation without a rule
    x = layers.Lambda(lambda t: t * 2.0)(conv(4, name="b")(x))
    x = layers.TimeDistributed(layers.Dense(4, use_bias=False))(x)
    x = layers.Reshape((-1, 2))(conv(4, name="c")(x))
    return keras.Model(inputs, layers.Dense(3, use_bias=False, name="d")(layers.Flatten()(x)))


def many():
    one, two = keras.Input((6, 5, 3)), keras.Input((4,))
    y = layers.Reshape((1, 1, 5))(layers.Dense(5, use_bias=False, name="a")(two))
    x = layers.Add()([conv(5, name="b")(one), y])
    return keras.Model([one, two], [conv(2, name="c")(x), layers.GlobalAveragePooling2D()(conv(1, name="e")(x))])


def lively(model):
    """Return `{path: table}` of the connections that the model's own gradients say are on a path."""
    import tensorflow as tf

    rng = np.random.default_rng(1)
    x = [tf.constant(rng.uniform(0.5, 1.5, (1, *t.shape[1:])), "float32") for t in model.inputs]
    found = {p: layer for p, layer in selection.flatten_layers(model).items() if connection_table(layer) is not None}
    with tf.GradientTape() as tape:
        total = sum(tf.reduce_sum(y) for y in keras.tree.flatten(model(x if len(x) > 1 else x[0])))
    gradients = tape.gradient(total, [layer._kernel.value for layer in found.values()])
    gradients = [
        np.zeros(layer.kernel.shape) if g is None else np.asarray(g) for g, layer in zip(gradients, found.values())
    ]
    return {path: (g != 0).any(axis=tuple(range(g.ndim - 2))) for path, g in zip(found, gradients)}
