import numpy as np
import tensorflow as tf

from keras_sparse.engine import timing


def test_every_function_is_timed_and_the_slow_one_is_slower():
    functions = {"once": lambda x: tf.matmul(x, x), "often": lambda x: tf.linalg.matmul(x, tf.linalg.expm(x))}
    seconds = timing.alternate(functions, [(300, 300)], repeats=3, budget=0.3)
    assert set(seconds) == set(functions)
    assert 0 < seconds["once"] < seconds["often"]  # by a factor of more than ten


def test_a_call_computes_as_often_as_asked_and_returns_part_of_each_result():
    # What is not returned, TensorFlow leaves out of the graph, and the time with it.
    run = timing._unrolled(lambda a, b: (a + b, a * b), inputs=2)
    pairs = [(2.0, 3.0), (4.0, 5.0), (6.0, 7.0)]
    got = run(*[tf.fill((2, 2), value) for pair in pairs for value in pair])
    np.testing.assert_array_equal(got, [5, 6, 9, 20, 13, 42])


def test_inputs_have_the_types_asked_for():
    seen = []

    def function(a, b):
        seen.append((a.dtype, b.dtype, tuple(a.shape)))
        return tf.cast(a, "float32")

    timing.alternate({"f": function}, [(2, 3), (4,)], dtype=["float16", "int32"], unroll=2, repeats=3, budget=0.1)
    assert seen == [(tf.float16, tf.int32, (2, 3))] * 2
