"""Regularization: on for the time of `fit`, on the effective kernel, and off again."""

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.callbacks import GradualPruning, Regularization
from keras_sparse.regularizers import GroupLasso


def sizes_of(layer):
    kernel = np.asarray(layer.kernel, "float64")
    return np.sqrt((kernel**2).sum(axis=-1))


class Losses(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.penalty = float(sum(self.model.losses)) if self.model.losses else 0.0
        self.expected = sum(sizes_of(layer).sum() for layer in self.model.layers if hasattr(layer, "kernel"))


def test_added_and_taken_off(cnn, fit, data, kind):
    model = cnn(kind, "group")
    losses = Losses()
    before = cnn(kind, "group")
    history = fit(model, Regularization(GroupLasso(0.5)), losses, optimizer="sgd", epochs=1).history
    assert losses.penalty == pytest.approx(0.5 * losses.expected, rel=1e-5)
    plain = fit(before, optimizer="sgd", epochs=1).history
    assert history["loss"][0] > plain["loss"][0] + 1  # the compiled step had it
    assert model.losses == []
    # ... and neither the next step nor an evaluation has it any more.
    x, y = data(model)
    error = float(np.mean((model.predict(x, verbose=0) - y) ** 2))
    assert model.evaluate(x, y, verbose=0) == pytest.approx(error, rel=1e-4)
    assert model.train_on_batch(x, y) == pytest.approx(error, rel=1e-4)


def test_evaluation_during_fit_knows_the_penalty(cnn, data, kind):
    model = cnn(kind, "group")
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = data(model)
    model.evaluate(x, y, verbose=0)  # traced without it
    callbacks = [Regularization(GroupLasso(0.5))]
    history = model.fit(x, y, validation_data=(x, y), callbacks=callbacks, verbose=0).history
    assert history["val_loss"][0] == pytest.approx(history["loss"][0], rel=1e-4)
    assert history["val_loss"][0] > model.evaluate(x, y, verbose=0) + 1


def test_beside_the_users_regularizer_and_another_callback(mlp):
    """On masked kernels: weights under the mask do not count, whatever the variable still holds."""
    model = mlp("sparse", kernel_regularizer=keras.regularizers.L2(0.1))
    mask = np.zeros((6, 8), "float32")
    mask[::2] = 1
    model.get_layer("a").mask.assign(mask)
    own = float(sum(model.losses))
    first, second = Regularization(GroupLasso(0.5)), Regularization("l1", include="b")
    first.start(model)
    second.start(model)
    groups = sum(sizes_of(model.get_layer(name)).sum() for name in "ab")
    l1 = 0.01 * np.abs(model.get_layer("b").kernel).sum()
    assert float(sum(model.losses)) == pytest.approx(own + 0.5 * groups + l1, rel=1e-5)
    first.finish()
    assert float(sum(model.losses)) == pytest.approx(own + l1, rel=1e-5)
    second.finish()
    assert float(sum(model.losses)) == pytest.approx(own, rel=1e-6)


def test_an_exception_leaves_it_on_until_it_is_finished(mlp, fit, kind):
    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise InterruptedError

    model = mlp(kind)
    lasso = Regularization(GroupLasso(0.5))
    with pytest.raises(InterruptedError):
        fit(model, lasso, Break())
    assert model.losses
    other = Regularization(GroupLasso(0.1), include="a")
    other.set_model(model)
    other.on_train_begin()
    assert len(model.losses) == 1  # of its own layer; "b" is not its business
    lasso.finish()
    assert model.losses == []


def test_a_saved_model_knows_nothing_of_it(mlp, fit, kind, tmp_path):
    model = mlp(kind)
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "m.keras")
    fit(model, Regularization(GroupLasso(0.5)), saving, epochs=1)
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.losses == []


def test_sparsification_with_fine_tuning(cnn, fit, kind):
    """The recipe of section 4.2: penalty, pruning of the weakest, fine-tuning with fixed patterns and no penalty."""
    model = cnn(kind, "group")
    fit(model, Regularization(GroupLasso(0.01), include="conv"), epochs=3)
    layer = model.get_layer("conv")
    sizes = sizes_of(layer)
    pruning = GradualPruning(ks.schedules.OneShot(0.75), granularity="group", criterion="l2", include="conv")
    pruning.start(model)
    pruning.finish()
    kept = sizes >= np.sort(sizes.ravel())[-round(0.25 * sizes.size)]
    np.testing.assert_array_equal(sizes_of(layer) > 0, kept)
    again = GradualPruning(ks.schedules.OneShot(0.75), granularity="group", criterion="l2", include="conv")
    fit(model, *([again] if kind == "plain" else []), epochs=2)
    np.testing.assert_array_equal(sizes_of(layer) > 0, kept)
    assert model.losses == []
