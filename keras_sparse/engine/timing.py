"""Fair timing of alternatives: one process, turn by turn, fresh inputs, medians."""

import itertools
import statistics
import time

import numpy as np
import tensorflow as tf

__all__ = ["alternate"]

_BUFFERS = 4


def alternate(functions, input_shapes, dtype="float32", unroll=1, repeats=9, budget=2.0, seed=0):
    """Time functions of tensors against each other.

    The functions take turns, so that a machine that slows down slows all of them; the inputs rotate, so that none
    finds them in its cache alone. In its turn a function is called twice, and the second call is timed: that of a
    model that is called again and again, not the change from one model to another.

    Args:
        functions: `{name: function}`; a function maps tensors of `input_shapes` to tensors and is traced here.
        input_shapes: List of shapes, the batch axis included.
        dtype: Type of the inputs, or a list of one for each.
        unroll: How often a call computes, one after the other. The cost of calling a graph, about 0.1 ms, is
            shared among them: 1 times what a user of a model waits for, more times the work of a single layer.
        repeats: Rounds, at least; more are made while they fit into a tenth of `budget`.
        budget: Seconds to spend on one function, roughly.
        seed: Seed of the random inputs.

    Returns:
        `{name: median seconds of one computation}`.
    """
    generator = np.random.default_rng(seed)
    dtypes = [dtype] * len(input_shapes) if isinstance(dtype, str) else dtype

    def random_input(shape, dtype):
        return tf.cast(generator.standard_normal(shape).astype("float32"), dtype)

    buffers = [[random_input(*pair) for pair in zip(input_shapes, dtypes)] for _ in range(_BUFFERS)]
    flag = tf.constant(True)
    specs = [tf.TensorSpec((), "bool"), *(tf.TensorSpec(b.shape, b.dtype) for _ in buffers for b in buffers[0])]
    # Turn t computes on buffers t, t + 1, ...
    turns = [[flag, *itertools.chain(*buffers[t:], *buffers[:t])] for t in range(_BUFFERS)]
    graphs = {
        name: tf.function(_unrolled(function, len(input_shapes), unroll)).get_concrete_function(*specs)
        for name, function in functions.items()
    }
    slowest = 0.0
    for graph in graphs.values():
        graph(*turns[0])  # the first call optimises the graph
        start = time.perf_counter()
        graph(*turns[1])
        slowest = max(slowest, time.perf_counter() - start)
    turn_seconds = max(2 * slowest, 1e-6)
    rounds = max(repeats, min(50, int(budget / 10 / turn_seconds)))
    rounds = max(3, min(rounds, int(budget / turn_seconds)))
    times = {name: [] for name in graphs}
    for turn in range(rounds):
        for name, graph in graphs.items():
            # The first call finds the caches full of what the other functions left, down to the graph's own nodes.
            graph(*turns[turn % _BUFFERS]).numpy()
            inputs = turns[(turn + 1) % _BUFFERS]
            start = time.perf_counter()
            graph(*inputs).numpy()
            times[name].append((time.perf_counter() - start) / unroll)
    return {name: statistics.median(values) for name, values in times.items()}


def _unrolled(function, inputs, unroll):
    """Return a function of a flag and several sets of tensors that computes on them in turn."""

    def run(flag, *tensors):
        done = []
        for i in range(unroll):
            start = i % _BUFFERS * inputs
            with tf.control_dependencies(done):
                outputs = tf.nest.flatten(function(*tensors[start : start + inputs]))
            # The cheapest node that keeps the results in the graph: it looks at the flag and not at them. Reading one
            # element of each takes as long as a small layer.
            done = [tf.raw_ops.Assert(condition=flag, data=outputs)]
        with tf.control_dependencies(done):
            return tf.identity(flag)

    return run
