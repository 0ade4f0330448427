"""What all tests share: a quiet TensorFlow, and one seed for every test, printed when it fails."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import pytest  # noqa: E402

SEED = 20170217


@pytest.fixture(autouse=True)
def seeded(request):
    print(f"seed of {request.node.name}: {SEED}")  # pytest shows it with a failure
    keras.utils.set_random_seed(SEED)
    yield
    keras.backend.clear_session()
