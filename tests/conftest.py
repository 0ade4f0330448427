"""What all tests share: a quiet TensorFlow, one seed, untouched settings of Keras, a second Python process."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pathlib  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402

import keras  # noqa: E402
import pytest  # noqa: E402

import keras_sparse as ks  # noqa: E402

SEED = 20170217


def pytest_make_parametrize_id(val):
    """Names of objects without their addresses: processes that share the tests have to call them alike."""
    text = str(val)
    name = re.sub(r"<(?:function )?(?:\w+\.)*(\w+)(?: object)? at 0x[0-9a-f]+>", r"\1", text)
    return name if name != text or isinstance(val, dict) else None


@pytest.fixture(autouse=True)
def seeded(request):
    print(f"seed of {request.node.name}: {SEED}")  # pytest shows it with a failure
    keras.utils.set_random_seed(SEED)


@pytest.fixture(autouse=True)
def restored_dtype_policy():
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.fixture(scope="session")
def channels_first_on_cpu():
    """Skip a test whose expected values are those of a Keras model that runs `channels_first` on a CPU.

    TensorFlow does so only where it uses oneDNN by default, which depends on the CPU.
    """
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    try:
        tf.nn.conv2d(tf.zeros((1, 1, 2, 2)), tf.zeros((1, 1, 1, 1)), 1, "SAME", data_format="NCHW")
    except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError):
        pytest.skip("this TensorFlow has no channels_first convolution on a CPU")


@pytest.fixture(scope="session")
def run_python():
    """Return a function that runs a script in a fresh process and returns what it printed."""

    def run(script, *arguments):
        root = str(pathlib.Path(ks.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
