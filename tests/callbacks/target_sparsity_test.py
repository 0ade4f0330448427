import inspect
import warnings

import keras
import numpy as np
import pytest

import keras_sparse as ks

CLASSES = {
    "ModelCheckpoint": ks.callbacks.SparsityModelCheckpoint,
    "EarlyStopping": ks.callbacks.SparsityEarlyStopping,
}


def network(kind="plain"):
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(20, name="a"), keras.layers.Dense(2, name="b")])
    model = ks.sparsify(model, "weight") if kind == "sparse" else model
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model


class Losses(keras.callbacks.Callback):
    """Logs given losses, whatever the model does."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = self.values[epoch]


def fit(model, callback, losses, pruning=True):
    x, y = np.ones((8, 10), "float32"), np.ones((8, 2), "float32")
    # Two steps an epoch: sparsity 0.9 from the third epoch on.
    schedule = ks.schedules.PolynomialDecay(0.3, 0.9, 0, 6, frequency=2)
    callbacks = [ks.callbacks.GradualPruning(schedule)] if pruning else []
    callbacks += [Losses(losses), *([callback] if callback else [])]
    return model.fit(x, y, batch_size=4, epochs=len(losses), callbacks=callbacks, verbose=0).history


@pytest.mark.parametrize("name", CLASSES)
def test_signature_is_keras_plus_keywords(name):
    theirs = list(inspect.signature(getattr(keras.callbacks, name).__init__).parameters.values())
    ours = list(inspect.signature(CLASSES[name].__init__).parameters.values())
    assert ours[: len(theirs)] == theirs
    extra = ours[len(theirs) :]
    assert [p.name for p in extra] == ["target_sparsity", "tolerance", "include", "exclude"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extra)
    assert issubclass(CLASSES[name], getattr(keras.callbacks, name))


@pytest.mark.parametrize("kind", ["plain", "sparse"])
def test_best_counts_from_the_target_on(kind, tmp_path):
    losses = [1.0, 0.1, 5.0, 4.0, 4.5]  # the best of all is not sparse yet
    ours = ks.callbacks.SparsityModelCheckpoint(
        tmp_path / "e{epoch}.keras", save_best_only=True, target_sparsity=0.9, verbose=0
    )
    history = fit(network(kind), ours, losses)
    assert [round(s, 2) for s in history["sparsity"]] == [0.72, 0.88, 0.9, 0.9, 0.9]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e3.keras", "e4.keras"]
    assert ks.count(keras.models.load_model(tmp_path / "e4.keras"))["total"]["sparsity"] == pytest.approx(
        0.9, abs=0.005
    )
    theirs = keras.callbacks.ModelCheckpoint(tmp_path / "k{epoch}.keras", save_best_only=True)
    fit(network(kind), theirs, losses)
    assert sorted(file.name for file in tmp_path.glob("k*")) == ["k1.keras", "k2.keras"]


def test_batches_count_from_the_target_on(tmp_path):
    ours = ks.callbacks.SparsityModelCheckpoint(
        tmp_path / "{epoch}-{batch}.weights.h5",
        monitor="loss",
        save_best_only=True,
        save_weights_only=True,
        save_freq=1,
        target_sparsity=0.9,
    )
    fit(network(), ours, [1.0] * 4)
    assert sorted(file.name for file in tmp_path.iterdir())[0] == "3-2.weights.h5"


def test_without_save_best_only_it_is_keras(tmp_path, recwarn):
    fit(
        network(),
        ks.callbacks.SparsityModelCheckpoint(tmp_path / "{epoch}.keras", target_sparsity=0.99),
        [1.0, 2.0, 3.0],
    )
    assert len(list(tmp_path.iterdir())) == 3
    assert not [w for w in recwarn if "never reached" in str(w.message)]


def test_patience_begins_at_the_target():
    losses = [1.0, 2.0, 5.0, 4.0, 4.5, 4.6, 4.7, 4.8]
    ours = ks.callbacks.SparsityEarlyStopping(patience=2, restore_best_weights=True, target_sparsity=0.9)
    history = fit(network(), ours, losses)
    assert len(history["loss"]) == 6 and ours.best_epoch == 3 and ours.best == 4.0
    # Keras counts from the first epoch on, and stops while the sparsity still rises.
    assert len(fit_quietly(network(), keras.callbacks.EarlyStopping(patience=1), losses)["loss"]) == 2


def fit_quietly(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(*arguments)


def test_best_weights_are_sparse():
    model = network("sparse")
    ours = ks.callbacks.SparsityEarlyStopping(patience=1, restore_best_weights=True, target_sparsity=0.9)
    fit(model, ours, [0.0, 0.1, 3.0, 4.0, 5.0])
    assert ks.count(model)["total"]["sparsity"] == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("kind", ["plain", "sparse"])
def test_the_masks_are_asked_where_nothing_is_logged(kind, tmp_path):
    model = network(kind)
    kernel = np.ones((10, 20), "float32")
    kernel[:, 4:] = 0
    if kind == "sparse":
        model.get_layer("a").assign_mask(kernel)
    else:
        model.get_layer("a").kernel.assign(kernel)
    saved = []
    for number, (target, options) in enumerate(
        [(0.8, {"include": "a"}), (0.8, {}), (160 / 240, {}), (0.81, {"include": "a"}), (0.8, {"exclude": "b"})]
    ):
        path = tmp_path / f"{number}.keras"
        callback = ks.callbacks.SparsityModelCheckpoint(path, save_best_only=True, target_sparsity=target, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model, callback, [1.0], pruning=False)
        saved.append(path.exists())
        assert saved[-1] != any("never reached `target_sparsity`" in str(w.message) for w in caught)
    assert saved == [True, False, True, False, True]


def test_a_target_that_is_never_reached():
    callback = ks.callbacks.SparsityEarlyStopping(target_sparsity=0.95)
    with pytest.warns(UserWarning, match="0.9000 in the end, never reached `target_sparsity`, 0.95: no epoch counted"):
        fit(network(), callback, [1.0, 2.0, 3.0, 4.0])


def test_density_is_understood():
    from keras_sparse.callbacks.observing import observed_sparsity

    assert observed_sparsity(network(), {"density": 0.25}) == 0.75
    assert observed_sparsity(network(), {"sparsity": 0.25, "loss": 1}) == 0.25
