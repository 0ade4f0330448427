"""Recurrent, embedding, attention and separable layers: trained, saved and served as the plain ones they are."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_sparse.callbacks import GradualPruning
from keras_sparse.schedules import PolynomialDecay

layers = keras.layers

SCHEDULE = PolynomialDecay(0.0, 0.75, 2, 14, frequency=4)


def functional():
    keras.utils.set_random_seed(7)
    x = keras.Input((6,), dtype="int32")
    y = layers.Embedding(11, 8, name="table")(x)
    shared = layers.Dense(8, name="shared")
    inner = keras.Sequential(
        [keras.Input((6, 8)), layers.SeparableConv1D(8, 3, padding="same", name="sep")], name="block"
    )
    y = shared(inner(shared(y)))
    y = layers.MultiHeadAttention(2, 3, name="attention")(y, y)
    y = layers.Bidirectional(layers.LSTM(4, return_sequences=True, name="lstm"), name="both")(y)
    return keras.Model(x, layers.Dense(3, name="head")(layers.Flatten()(y)))


class Subclassed(keras.Model):
    """Layers in a list and in a model within, and a step of its own."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(11, 8, name="table")
        self.blocks = [layers.LSTM(4, return_sequences=True, name=f"lstm{i}") for i in range(2)]
        self.inner = keras.Sequential([layers.SimpleRNN(5, name="rnn")], name="inner")
        self.head = layers.Dense(3, name="head")

    def call(self, x, training=None):
        x = self.table(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.inner(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        self.optimizer.apply_gradients(zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables))
        return {"loss": loss}


def subclassed():
    keras.utils.set_random_seed(7)
    model = Subclassed()
    model(np.zeros((1, 6), "int32"))
    return model


def data():
    generator = np.random.default_rng(3)
    return generator.integers(0, 11, (40, 6)).astype("int32"), generator.normal(size=(40, 3)).astype("float32")


def assert_pruned(kernels, masks):
    for name, kernel in kernels.items():
        np.testing.assert_array_equal(kernel != 0, masks[name] == 1, err_msg=name)


@pytest.mark.parametrize(("make", "optimizer"), [(functional, "adamw"), (subclassed, "sgd")])
def test_in_fit(make, optimizer, recorder):
    """Between updates nothing moves a pruned weight, whatever momentum and weight decay would."""
    model, (x, y) = make(), data()
    optimizers = {
        "adamw": keras.optimizers.AdamW(0.01, weight_decay=0.1),
        "sgd": keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01),
    }
    model.compile(optimizers[optimizer], "mse")
    pruning = GradualPruning(SCHEDULE)
    before, after = recorder(pruning), recorder(pruning)
    model.fit(x, y, batch_size=4, epochs=2, callbacks=[before, pruning, after], verbose=0)
    for name, kernel in after.kernels[-1].items():
        assert (kernel != before.kernels[0][name])[after.masks[-1][name] == 1].all(), name  # what is kept is trained
    for kernels, masks in zip(after.kernels, after.masks):
        assert_pruned(kernels, masks)
    for step, earlier, later in zip(after.steps, before.masks, after.masks):
        changed = any((earlier[name] != later[name]).any() for name in earlier)
        assert changed == (step in (6, 10, 14)), step  # at step 2 the sparsity is 0; after 14 the masks stand
        for name in earlier:
            assert (later[name] <= earlier[name]).all()
    for name, mask in after.masks[-1].items():
        assert mask.sum() == max(1, round(mask.size / 4)), name


def test_loop_of_ones_own():
    model, (x, y) = functional(), data()
    optimizer, pruning = keras.optimizers.Adam(0.01), GradualPruning(SCHEDULE)
    pruning.start(model)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables))

    for step in range(1, 16):
        train_step(x, y)
        assert_pruned(
            *({w.name: read(w) for w in pruning._weights} for read in (lambda w: w.kernel(), lambda w: w.mask()))
        )
        pruning.update(step)
    pruning.finish()
    assert [entry["step"] for entry in pruning.history] == [2, 6, 10, 14]
    assert pruning.history[-1]["sparsity"] == pytest.approx(0.75, abs=0.01)


SERVE = """
import json, sys
import keras, numpy as np, tensorflow as tf

folder = sys.argv[1]
x = np.load(folder + "/x.npy")
model = keras.models.load_model(folder + "/2.keras")
served = tf.saved_model.load(folder + "/served")
zeros = [int((keras.ops.convert_to_numpy(v) == 0).sum()) for v in model.trainable_variables]
reader = tf.train.load_checkpoint(folder + "/served/variables/variables")
tensors = [reader.get_tensor(name) for name in reader.get_variable_to_shape_map()]
kernels = [v for v in tensors if getattr(v, "ndim", 0) >= 2 and v.dtype == "float32"]
in_served = sorted({(*v.shape, int((v == 0).sum())) for v in kernels})
outputs = [np.asarray(model(x)).tolist(), served.serve(x).numpy().tolist()]
assert not any(name.startswith("keras_sparse") for name in sys.modules)
print(json.dumps([zeros, in_served, outputs]))
"""


def test_saved_while_training_and_served_without_the_package(run_python, recorder, tmp_path):
    """The files of a run that is still under way hold exact zeros, and nothing that needs this package."""
    model, (x, y) = functional(), data()
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), "mse")

    class Export(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                self.model.export(str(tmp_path / "served"), verbose=False)
                self.paths = {w.name: w.variable.path for w in pruning._weights}
                self.outputs = np.asarray(self.model(x))
                self.zeros = {v.path: int((v.numpy() == 0).sum()) for v in self.model.trainable_variables}
                kernels = [v.numpy() for v in self.model.trainable_variables if len(v.shape) >= 2]
                self.kernels = sorted({(*v.shape, int((v == 0).sum())) for v in kernels})

    pruning, export = GradualPruning(SCHEDULE), Export()
    record = recorder(pruning)
    whole = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    weights = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.weights.h5"), save_weights_only=True)
    model.fit(x, y, batch_size=4, epochs=3, callbacks=[whole, weights, export, pruning, record], verbose=0)

    masks = record.masks[19]  # at the end of the second epoch
    assert all((mask == 0).any() for mask in masks.values())
    expected = {path: int((masks[name] == 0).sum()) for name, path in export.paths.items()}
    for path, zeros in export.zeros.items():
        assert zeros == expected.get(path, zeros), path
    np.save(tmp_path / "x.npy", x)
    loaded, served, outputs = json.loads(run_python(SERVE, tmp_path))
    assert loaded == list(export.zeros.values())
    assert list(map(tuple, served)) == export.kernels
    for values in outputs:
        np.testing.assert_allclose(values, export.outputs, atol=1e-6)
    again = functional()
    again.load_weights(tmp_path / "2.weights.h5")
    assert {v.path: int((v.numpy() == 0).sum()) for v in again.trainable_variables if v.path in expected} == expected


def test_resumed_from_the_file(tmp_path):
    """The zeros of every weight are its mask: a run that goes on from a file ends as the uninterrupted one."""

    def network():
        keras.utils.set_random_seed(7)
        parts = [layers.Embedding(11, 8, name="table"), layers.LSTM(4, name="lstm"), layers.Dense(3, name="head")]
        model = keras.Sequential([keras.Input((6,), dtype="int32"), *parts])
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        return model

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.save(tmp_path / "m.keras")
            raise InterruptedError

    (x, y), whole = data(), network()
    options = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    whole.fit(x, y, callbacks=[GradualPruning(SCHEDULE)], **options)
    with pytest.raises(InterruptedError):
        network().fit(x, y, callbacks=[GradualPruning(SCHEDULE), Stop()], **options)
    resumed = keras.models.load_model(tmp_path / "m.keras")
    resumed.fit(x, y, initial_epoch=1, callbacks=[GradualPruning(SCHEDULE)], **options)
    for one, other in zip(whole.trainable_variables, resumed.trainable_variables):
        np.testing.assert_array_equal(one.numpy() == 0, other.numpy() == 0)
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-5, err_msg=one.path)
