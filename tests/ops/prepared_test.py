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


@pytest.mark.parametrize("routine", ["connection", "thinned"])
def test_ops_with_a_common_table_or_filter(routine):
    """Ops of a process share what they prepare from the same tensors, and nothing else."""
    generator = np.random.default_rng(1)
    x = tf.constant(generator.standard_normal((2, 9, 9, 8)).astype("float32"))
    if routine == "connection":
        variables = connection_variables(generator)
        other = tf.Variable(np.tile(np.array([1, 3, 7], "int32"), 6))

        def convolve(module, filter, *table):
            return module.connection_conv2d(x, filter, *table, padding="same")
    else:
        variables = thinned_variables(generator)
        other = tf.Variable(np.arange(1, 61, 3, dtype="int32"))

        def convolve(module, filter, *table):
            return module.thinned_conv2d(x, filter, *table, (3, 3), padding="same")

    filters = [variables[0], tf.Variable(-2 * variables[0])]
    tables = [variables[1:], (*variables[1:-1], other)]
    operands = [(f, *t) for f in filters for t in tables] * 2
    graphs = [tf.function(lambda o=o: convolve(ks.ops, *o)) for o in operands]

    def check():
        results = [graph() for graph in graphs]
        for o, result in zip(operands, results):
            np.testing.assert_allclose(result, convolve(reference, *o), rtol=1e-4, atol=1e-4)
        for first, second in zip(results[:4], results[4:]):
            np.testing.assert_array_equal(first, second)

    check()
    check()
    filters[0].assign_add(tf.ones_like(filters[0]))
    check()
    tables[0][-1].assign(other)  # Now both tables have the same values, in different places.
    check()
    del graphs[:4], operands[:4]  # Who prepared it is gone.
    graphs += [tf.function(lambda o=o: convolve(ks.ops, *o)) for o in operands]
    operands += operands
    check()
