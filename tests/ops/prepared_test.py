"""What an op keeps from one call to the next must never be older than its inputs."""

import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks
from keras_sparse.ops import reference

pytestmark = pytest.mark.skipif(not ks.ops.is_available(), reason="The compiled ops are missing.")


def connection_variables(generator):
    # Rows of 3 of 8 input channels, so that another table of the same shape is a table as well.
    row_splits = tf.Variable(np.arange(0, 19, 3, dtype="int32"))
    input_channels = tf.Variable(np.tile(np.array([0, 2, 5], "int32"), 6))
    filter = tf.Variable(generator.standard_normal((18, 3, 3)).astype("float32"))
    return filter, row_splits, input_channels


def thinned_variables(generator):
    indices = tf.Variable(np.arange(0, 60, 3, dtype="int32"))
    return tf.Variable(generator.standard_normal((20, 32)).astype("float32")), indices


CHANGES = {
    "assign": lambda v, d: v.assign(v + d),
    "assign_add": lambda v, d: v.assign_add(tf.fill(v.shape, tf.cast(d, v.dtype))),
    # Puts the variable into a mode in which it is changed in place.
    "scatter": lambda v, d: v.scatter_nd_update([[0]], [v[0] + tf.cast(d, v.dtype)]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("pixels", [4, 12])  # also images that fit a vector
def test_changed_tables_and_filters_are_seen(change, pixels):
    generator = np.random.default_rng(0)
    x = tf.constant(generator.standard_normal((2, pixels, pixels, 8)).astype("float32"))
    change = CHANGES[change]

    def check(compiled, plain, variables):
        graph = tf.function(compiled)
        for step in range(12):
            np.testing.assert_allclose(graph(x), plain(x), rtol=1e-4, atol=1e-4)
            # The filter at times once in a while, at times in every step.
            if step > 4 or step % 2:
                change(variables[0], 0.5)
            if step in (2, 3, 8):
                change(variables[-1], -1 if step == 3 else 1)

    variables = connection_variables(generator)
    check(
        lambda x: ks.ops.connection_conv2d(x, *variables, padding="same"),
        lambda x: reference.connection_conv2d(x, *variables, padding="same"),
        variables,
    )
    thinned = thinned_variables(generator)
    check(
        lambda x: ks.ops.thinned_conv2d(x, *thinned, (3, 3), padding="same"),
        lambda x: reference.thinned_conv2d(x, *thinned, (3, 3), padding="same"),
        thinned,
    )
