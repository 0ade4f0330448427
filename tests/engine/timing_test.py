import tensorflow as tf

from keras_sparse.engine import timing


def test_every_function_is_timed_and_the_slow_one_is_slower():
    functions = {"once": lambda x: tf.matmul(x, x), "often": lambda x: tf.linalg.matmul(x, tf.linalg.expm(x))}
    seconds = timing.alternate(functions, [(300, 300)], repeats=3, budget=0.3)
    assert set(seconds) == set(functions)
    assert 0 < seconds["once"] < seconds["often"]  # by a factor of more than ten


def test_a_call_computes_as_often_as_asked_though_nobody_reads_the_results():
    # What TensorFlow finds unused it leaves out of the graph, and its time with it.
    seen = []

    def note(x):
        seen.append(float(x[0]))
        return x

    def function(x):
        return tf.numpy_function(note, [x], tf.float32, stateful=False), tf.abs(x)

    graph = tf.function(timing._unrolled(function, inputs=1, unroll=6))
    graph(tf.constant(True), *[tf.fill([2], float(i)) for i in range(timing._BUFFERS)])
    assert seen == [0, 1, 2, 3, 0, 1]


def test_a_turn_is_two_calls_on_different_inputs():
    seen = []

    def function(name):
        def note(x):
            seen.append((name, float(x[0])))
            return x

        return lambda x: tf.numpy_function(note, [x], tf.float32)

    timing.alternate({name: function(name) for name in "ab"}, [(2,)], repeats=3, budget=1e-9)
    turns = seen[-12:]  # three rounds; before, each function is called to be traced
    assert [name for name, _ in turns] == list("aabb" * 3)
    assert len({value for name, value in turns if name == "a"}) == 4  # all buffers
    assert all(turns[i][1] != turns[i + 1][1] for i in range(0, 12, 2))


def test_inputs_have_the_types_asked_for():
    seen = []

    def function(a, b):
        seen.append((a.dtype, b.dtype, tuple(a.shape)))
        return tf.cast(a, "float32")

    timing.alternate({"f": function}, [(2, 3), (4,)], dtype=["float16", "int32"], unroll=2, repeats=3, budget=0.1)
    assert seen == [(tf.float16, tf.int32, (2, 3))] * 2
