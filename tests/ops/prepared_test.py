"""What ops keep from one call to the next: never older than their inputs, never in use twice, and not without end."""

import os

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


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def large_results(generator, batch):
    """Return a function of a scale to a result of `batch` MB, and what it must be for a scale of 1."""
    filter, indices = thinned_variables(generator)
    x = tf.constant(generator.standard_normal((batch, 128, 64, 8)).astype("float32"))
    plain = reference.thinned_conv2d(x, filter, indices, (3, 3), padding="same")

    def compute(scale):
        return ks.ops.thinned_conv2d(x * scale, filter, indices, (3, 3), padding="same")

    assert plain.shape[1:] == (128, 64, 32)  # 1 MB an image
    return compute, plain


def test_large_results_have_memory_of_their_own():
    compute, plain = large_results(np.random.default_rng(2), 2)
    alive = {}
    for step in range(24):  # results go and others take their memory while some stay
        alive[step % 7] = step + 1.0, compute(step + 1.0)
        if step % 3 == 0:
            alive.pop((step // 3) % 7, None)
        for scale, result in alive.values():
            np.testing.assert_allclose(result, plain * scale, rtol=1e-4, atol=1e-4 * scale)
    # A view of the memory outlives its tensor.
    view = compute(1.0).numpy()
    alive.clear()
    others = [compute(2.0) for _ in range(4)]
    np.testing.assert_allclose(view, plain, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(others[-1], plain * 2.0, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="There is no such file to read from.")
def test_memory_of_large_results_is_given_back():
    generator = np.random.default_rng(3)
    compute, _ = large_results(generator, 1)
    compute(1.0)
    before = resident_bytes()
    results = [compute(1.0) for _ in range(600)]  # each in a block of 2 MB
    assert resident_bytes() - before >= 600 << 20
    del results
    # What is kept: 256 MB. The rest is some slack.
    assert resident_bytes() - before < 320 << 20
