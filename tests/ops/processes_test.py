# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""What needs a process of its own: threads, instruction sets, a missing library, SavedModels."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import oracle
import tensorflow as tf

from keras_sparse import ops

# Prints a checksum of every op's result, bit for bit, and saves the results.
COMPUTE = """
import hashlib, sys
import numpy as np
import tensorflow as tf
threads, target, library = int(sys.argv[1]), sys.argv[2], sys.argv[3]
tf.config.threading.set_intra_op_parallelism_threads(threads)
import oracle
ops = tf.load_op_library(library)
results = []
for case, (n, h, ci, co, k, stride) in enumerate(
    [(8, 16, 48, 40, 3, 1), (1, 14, 64, 32, 3, 1), (3, 9, 17, 18, 3, 2), (40, 7, 33, 20, 1, 1),
     (1, 60, 40, 24, 5, 1)]
):
    generator = oracle.rng(21, case)
    attributes = dict(padding="SAME", strides=[stride, stride])
    x = generator.standard_normal((n, h, h, ci)).astype("f")
    _, w, *table = oracle.connection_table(generator, 0.3, (k, k), ci, co)
    _, w2, indices = oracle.thinned_filter(generator, 0.3, (k, k), ci, co)
    y = ops.keras_sparse_connection_conv2d(x, w, *table, **attributes)
    results.append(y)
    results.append(ops.keras_sparse_fused_connection_conv2d(
        x, w, *table, [y[0, 0, 0]], [-y], activation="relu6", **attributes))
    results.append(ops.keras_sparse_connection_conv2d_backprop_input(
        x.shape, w, *table, y, **attributes))
    results.append(ops.keras_sparse_connection_conv2d_backprop_filter(
        x, *table, y, kernel_size=[k, k], **attributes))
    attributes["kernel_size"] = [k, k]
    results.append(ops.keras_sparse_thinned_conv2d(x, w2, indices, **attributes))
    results.append(ops.keras_sparse_thinned_conv2d_backprop_input(
        x.shape, w2, indices, y, **attributes))
    results.append(ops.keras_sparse_thinned_conv2d_backprop_filter(
        x, indices, y, **attributes))
results = [r.numpy() for r in results]
np.savez(target, *results)
print(hashlib.sha256(b"".join(r.tobytes() for r in results)).hexdigest())
"""


def package_folder():
    return os.path.dirname(os.path.dirname(os.path.abspath(ops.__file__)))


def run(code, *arguments, path=None, **environment):
    """Runs Python code in a new process; returns its standard output."""
    folders = [path or os.path.dirname(package_folder()), os.path.dirname(oracle.__file__)]
    result = subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment},
        cwd=folders[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_threads_and_instruction_sets(tmp_path):
    """Bitwise equal at any thread count; every instruction set agrees within rounding."""

    def compute(threads, **environment):
        file = str(tmp_path / "results.npz")
        checksum = run(COMPUTE, str(threads), file, ops.library_path(), **environment).stdout.strip()
        with np.load(file) as loaded:
            return checksum, [loaded[name] for name in loaded.files]

    best, results = compute(1)
    assert compute(5)[0] == best

    expected = compute(2, KERAS_SPARSE_ISA="reference")[1]
    for isa in ("baseline", "avx2"):
        checksum, other = compute(2, KERAS_SPARSE_ISA=isa)
        for actual in (other, results):
            for a, b in zip(actual, expected):
                np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), err_msg=isa)
        # Forcing had an effect: other instruction sets add in another order.
        assert isa != "baseline" or checksum != best


# Ops of several callers share three threads, again and again; prints how many results differ from the first ones.
CONCURRENT = """
import concurrent.futures, sys
import numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(3)
import oracle
ops = tf.load_op_library(sys.argv[1])
layers = []
for case, (n, h, ci, co, k) in enumerate(
    [(1, 28, 96, 96, 3), (6, 14, 128, 96, 3), (1, 14, 512, 64, 1), (1, 4, 400, 400, 3)]
):
    generator = oracle.rng(23, case)
    x = tf.constant(generator.standard_normal((n, h, h, ci)).astype("f"))
    _, w, *table = oracle.connection_table(generator, 0.3, (k, k), ci, co)
    _, w2, indices = oracle.thinned_filter(generator, 0.3, (k, k), ci, co)
    options = dict(padding="SAME", strides=[1, 1])
    layers.append(lambda x=x, w=w, table=table, options=options: ops.keras_sparse_connection_conv2d(
        x, w, *table, **options).numpy())
    layers.append(lambda x=x, w=w2, indices=indices, k=k, options=options: ops.keras_sparse_thinned_conv2d(
        x, w, indices, kernel_size=[k, k], **options).numpy())
first = [layer() for layer in layers]
def differences(caller):
    turns = [(caller + i) % len(layers) for i in range(40 * len(layers))]
    return sum(not np.array_equal(layers[i](), first[i]) for i in turns)
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(sum(pool.map(differences, range(4))))
"""


def test_concurrent_ops():
    """Ops that run at the same time take turns on the threads of a pool, and none takes another's work or memory."""
    assert run(CONCURRENT, ops.library_path()).stdout.split()[-1] == "0"


def copy_package(target, library):
    """Copies keras_sparse.ops, with `library` as the bytes of its .so (None: without)."""
    os.makedirs(target / "keras_sparse")
    shutil.copytree(
        os.path.dirname(ops.__file__),
        target / "keras_sparse" / "ops",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    if library is not None:
        (target / "keras_sparse" / "ops" / "_keras_sparse_ops.so").write_bytes(library)


FALLBACK = """
import json, warnings
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import keras_sparse.ops as ops
    import oracle
    generator = oracle.rng(22)
    x = generator.standard_normal((2, 8, 8, 3)).astype("f")
    kernel, w, *table = oracle.connection_table(generator, 0.5, (3, 3), 3, 4)
    y = ops.connection_conv2d(x, w, *table, strides=2)
    oracle.assert_close(y, oracle.conv2d(x, kernel, (2, 2)), 27)
    kernel, w, indices = oracle.thinned_filter(generator, 0.5, (3, 3), 3, 4)
    oracle.assert_close(ops.thinned_conv2d(x, w, indices, 3), oracle.conv2d(x, kernel), 27)
    try:
        path = ops.library_path()
    except FileNotFoundError as error:
        path = str(error)
ours = [str(w.message) for w in caught if "keras_sparse" in str(w.message)]
print(json.dumps([ops.is_available(), path, ours]))
"""


def test_missing_library_warns_once_and_computes(tmp_path):
    copy_package(tmp_path, None)
    available, path, warned = json.loads(run(FALLBACK, path=str(tmp_path)).stdout.strip().splitlines()[-1])
    assert not available
    assert "there is no such file" in path and "pip install" in path
    assert len(warned) == 1 and "pip install" in warned[0]


def test_library_for_another_tensorflow_is_not_loaded(tmp_path):
    with open(ops.library_path(), "rb") as file:
        library = file.read()
    marker = b"keras_sparse-tensorflow-version:2."
    assert library.count(marker) == 1
    copy_package(tmp_path, library.replace(marker, marker[:-2] + b"1."))
    available, _, warned = json.loads(run(FALLBACK, path=str(tmp_path)).stdout.strip().splitlines()[-1])
    assert not available
    assert len(warned) == 1 and "was built for 1." in warned[0]


LOAD = """
import sys
import numpy as np
import tensorflow as tf
tf.load_op_library(sys.argv[2])
y = tf.saved_model.load(sys.argv[1])(np.ones((3, 4, 4, 2), "f"))
assert np.all(y == 2) and y.shape == (3, 4, 4, 1)
assert "keras_sparse" not in sys.modules
"""


def test_saved_model_loads_with_the_library_alone(tmp_path):
    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 4, 4, 2])])
        def __call__(self, x):
            return ops.connection_conv2d(x, tf.ones([2, 1, 1]), [0, 2], [0, 1])

    tf.saved_model.save(Module(), str(tmp_path))
    run(LOAD, str(tmp_path), ops.library_path())
