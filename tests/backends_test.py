"""Training, counting and saving on Keras's JAX backend; runs where JAX is installed."""

import importlib.util

import pytest

TRAIN = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import sys
import tempfile
import keras
import numpy as np
import keras_sparse as ks

assert "tensorflow" not in sys.modules
generator = np.random.default_rng(0)
x, y = generator.random((64, 8, 8, 3)), generator.random((64, 4))


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    features = keras.layers.Conv2D(8, 3, padding="same", name="conv")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4, name="dense")(keras.layers.Flatten()(features)))


for model in (ks.sparsify(network()), network()):
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    pruning = ks.callbacks.GradualPruning(ks.schedules.PolynomialDecay(0.0, 0.9, 2, 12, frequency=3))
    history = model.fit(x, y, epochs=3, batch_size=8, callbacks=[pruning], verbose=0).history
    assert [record["step"] for record in pruning.history] == [2, 5, 8, 11, 12]
    for name in ("conv", "dense"):
        kernel = np.asarray(model.get_layer(name).kernel)
        assert abs((kernel == 0).mean() - 0.9) < 0.02, (name, (kernel == 0).mean())
    assert history["loss"][-1] < history["loss"][0]
    assert abs(ks.count(model)["total"]["sparsity"] - history["sparsity"][-1]) < 1e-6
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder + "/m.keras")
        again = keras.models.load_model(folder + "/m.keras")
    saved, kept = (np.asarray(m.get_layer("conv").kernel) for m in (again, model))
    np.testing.assert_array_equal(saved, kept)

model = ks.sparsify(network(), include="conv")
model.compile(keras.optimizers.Adam(1e-3), "mse")
growing = ks.callbacks.IncrementalTraining(0.25, doubling_steps=6, initializer="layer")
history = model.fit(x, y, epochs=3, batch_size=8, callbacks=[growing], verbose=0).history
assert [record["step"] for record in growing.history] == [0, 6, 12]
assert history["density"] == [0.5, 1.0, 1.0], history["density"]
assert np.asarray(model.get_layer("conv").kernel).all()

def recurrent():
    keras.utils.set_random_seed(0)
    parts = [keras.layers.LSTM(7, name="lstm"), keras.layers.Dense(4, name="head")]
    return keras.Sequential([keras.Input((6, 5)), *parts])


def zeros_of(model):
    kernels = [v for v in model.trainable_variables if len(v.shape) == 2]
    return sum(int((np.asarray(v) == 0).sum()) for v in kernels) / sum(np.asarray(v).size for v in kernels)


x, y = generator.random((64, 6, 5)), generator.random((64, 4))
saliency = ks.criteria.Saliency((x, y), "mse", batches=2)
assert abs(ks.prune(recurrent(), 0.7, criterion=saliency, allocation="erk") - 0.7) < 0.02
schedule = ks.schedules.PolynomialDecay(0.0, 0.8, 2, 12, frequency=3)
for callback in (
    ks.callbacks.GradualPruning(schedule, criterion=saliency, allocation="global"),
    ks.callbacks.RigL(0.8, (x, y), end_step=20, frequency=4),
    ks.callbacks.SET(0.8, end_step=20, frequency=4),
):
    model = recurrent()
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    masks = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: masks.append({w.name: w.mask() for w in callback._weights})
    )
    model.fit(x, y, epochs=3, batch_size=8, callbacks=[callback, note], verbose=0)
    assert abs(zeros_of(model) - 0.8) < 0.03, (callback, zeros_of(model))
    changes = [
        step for step in range(1, 24) if any((masks[step][n] != masks[step - 1][n]).any() for n in masks[step])
    ]
    due = [4, 7, 10, 11] if isinstance(callback, ks.callbacks.GradualPruning) else [4, 8, 12, 16, 20]
    assert set(changes) <= set(due) and len(changes) >= 3, (callback, changes)

for name in ("export", "load", "ops"):
    try:
        getattr(ks, name)
    except AttributeError as error:
        assert "needs the TensorFlow backend" in str(error)
    else:
        raise SystemExit(f"keras_sparse.{name} is there")
print("trained")
"""


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_jax(run_python):
    assert run_python(TRAIN).strip().endswith("trained")
