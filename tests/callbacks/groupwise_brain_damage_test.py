"""GroupwiseBrainDamage: theta follows the drop, what is below epsilon dies for good, and resumed runs go on exactly."""

import json

import keras
import numpy as np
import pytest
from interruption import Interrupt, state

import keras_sparse as ks
from keras_sparse.callbacks import GroupwiseBrainDamage

# Images of stripes: the direction tells the class, in both channels.
GENERATOR = np.random.default_rng(0)
LABELS = GENERATOR.integers(0, 2, size=120)
STRIPES = np.stack([np.sin(np.arange(5) * 2.0)[:, None] * np.ones(5), np.sin(np.arange(5) * 2.0) * np.ones((5, 1))])
IMAGES = (STRIPES[LABELS][..., None] * [1.0, 0.5] + GENERATOR.normal(size=(120, 5, 5, 2))).astype("float32")
TRAIN, HELD_OUT = (IMAGES[:80], LABELS[:80]), (IMAGES[80:], LABELS[80:])


TRAINED = {}  # kernels and biases of the network that all tests start from


def network(kind="sparse", **options):
    if not TRAINED:
        TRAINED["conv1"] = None  # not to train for ever
        model = network("plain")
        fit(model, epochs=15)
        TRAINED.update(
            {n: [np.asarray(w) for w in model.get_layer(n).get_weights()] for n in ("conv1", "conv2", "head")}
        )
    keras.utils.set_random_seed(11)
    conv = {"activation": "relu", **options}
    layer = keras.layers.Conv2D
    if kind == "sparse":
        layer, conv = ks.layers.SparseConv2D, {**conv, "granularity": "group"}
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            layer(4, 3, padding="same", name="conv1", **conv),
            layer(6, 3, name="conv2", **conv),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(2, name="head"),
        ],
        name="net",
    )
    if kind == "sparse":
        model.get_layer("conv1").execution = model.get_layer("conv2").execution = "dense"  # traced in half the time
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    if "head" in TRAINED:
        for name, (kernel, bias) in TRAINED.items():
            model.get_layer(name)._kernel.assign(kernel)
            model.get_layer(name).bias.assign(bias)
    return model


def damage(**options):
    options = {"delta": 0.1, "epsilon": 0.25, "lambda_": 0.5, "batch_size": 40, **options}
    return GroupwiseBrainDamage(options.pop("validation_data", HELD_OUT), **options)


def fit(model, *callbacks, epochs=6, **options):
    options = {"batch_size": 10, "shuffle": False, "verbose": 0, "epochs": epochs, **options}
    return model.fit(*TRAIN, callbacks=list(callbacks), **options)


def norms_of(model):
    kernels = [np.asarray(model.get_layer(name).kernel, "float64") for name in ("conv1", "conv2")]
    return [np.sqrt((kernel**2).sum(axis=-1)) for kernel in kernels]


class Watch(keras.callbacks.Callback):
    """Norms and accuracies at the end of every epoch, before (`first`) or after the callback that is watched."""

    def __init__(self):
        super().__init__()
        self.norms, self.scores, self.thetas, self.losses = [], [], [], []
        self.damage = None

    def on_epoch_end(self, epoch, logs=None):
        self.norms.append(norms_of(self.model))
        if self.damage is not None:
            order = np.random.default_rng(self.damage.seed).permutation(len(HELD_OUT[0]))
            outputs = self.model.predict(HELD_OUT[0], verbose=0).argmax(-1) == HELD_OUT[1]
            self.scores.append([outputs[order[:20]].mean(), outputs[order[20:]].mean()])
            self.thetas.append(float(self.damage.regularizer.theta))
            self.losses.append(float(sum(self.model.losses)))


@pytest.mark.parametrize("kind", ["sparse", pytest.param("plain", marks=pytest.mark.slow)])
def test_every_epoch_does_what_the_paper_says(kind):
    model, callback = network(kind), damage(delta=0.04)
    order = np.random.default_rng(0).permutation(40)
    start = model.predict(HELD_OUT[0], verbose=0).argmax(-1) == HELD_OUT[1]
    start = [start[order[:20]].mean(), start[order[20:]].mean()]
    theta_before = [np.concatenate([n.ravel() for n in norms_of(model)])]
    before, after = Watch(), Watch()
    after.damage = callback
    history = fit(model, before, callback, after, epochs=12).history
    assert len(callback.history) == 13
    initial = callback.history[0]
    assert initial["drop"] == initial["test_drop"] == initial["sparsity"] == initial["died"] == 0
    sizes = np.sort(theta_before[0])
    assert (sizes < initial["theta"]).sum() == round(0.05 * sizes.size)
    alive = [np.ones((3, 3, 2), bool), np.ones((3, 3, 4), bool)]
    theta, rises, falls = initial["theta"], 0, 0
    for index, record in enumerate(callback.history[1:]):
        died = [(norm < 0.25) & a for norm, a in zip(before.norms[index], alive)]
        alive = [a & ~d for a, d in zip(alive, died)]
        for norm, a in zip(after.norms[index], alive):
            np.testing.assert_array_equal(norm > 0, a)  # eliminated, for good, and nothing else
        assert record["died"] == sum(int(d.sum()) for d in died)
        assert record["layers"] == {name: pytest.approx(1 - a.mean()) for name, a in zip(("conv1", "conv2"), alive)}
        kept = sum(int(a.sum()) * outputs for a, outputs in zip(alive, (4, 6)))
        assert record["sparsity"] == pytest.approx(1 - kept / (18 * 4 + 36 * 6))
        assert record["accuracy"] == pytest.approx(after.scores[index][0])
        assert record["test_accuracy"] == pytest.approx(after.scores[index][1])
        assert record["drop"] == pytest.approx(start[0] - record["accuracy"])
        assert record["test_drop"] == pytest.approx(start[1] - record["test_accuracy"])
        left = np.sort(np.concatenate([norm[a] for norm, a in zip(after.norms[index], alive)]))
        move = max(1, round(0.05 * left.size))
        inside, now = int((left < theta).sum()), int((left < record["theta"]).sum())
        if record["drop"] < 0.04:
            assert now == min(inside + move, left.size)
            rises += 1
        else:
            assert now == max(inside - move, 0)
            falls += 1
        assert record["percentile"] == pytest.approx(100 * now / left.size)
        theta = record["theta"]
        assert after.thetas[index] == theta
        assert after.losses[index] == pytest.approx(0.5 * np.minimum(np.concatenate([left, []]), theta).sum(), rel=1e-4)
        assert history["sparsity"][index] == record["sparsity"] and history["theta"][index] == theta
    assert rises and falls, "the run has to show both"
    assert callback.history[-1]["sparsity"] > 0.2
    assert model.losses == []  # the penalty has gone


def test_the_regularizer_moves_the_groups_below_theta_alone():
    """The compiled step follows theta as it moves."""
    model, callback = network(), damage(epsilon=0.0, lambda_=0.05, delta=0.9)
    model.optimizer.learning_rate = 1.0
    model.optimizer.momentum = 0.0
    frozen = keras.losses.MeanSquaredError(reduction="sum")
    model.compile(keras.optimizers.SGD(1.0), lambda y, x: 0.0 * frozen(y, x[:, :1]), metrics=["accuracy"])
    watch = Watch()
    before = norms_of(model)
    fit(model, callback, watch, epochs=5)
    for index in range(5):
        theta = callback.history[index]["theta"]
        for old, new in zip(before, watch.norms[index]):
            inside = old < theta
            np.testing.assert_array_equal(new[~inside], old[~inside])
            # Eight steps of size lambda towards zero, which they cross in the end.
            far = inside & (old > 0.41)
            np.testing.assert_allclose(new[far], old[far] - 8 * 0.05, rtol=1e-4)
            assert (new[inside & ~far] < 0.06).all()
        before = watch.norms[index]
    assert callback.history[4]["percentile"] > 20


def test_it_stops_when_nothing_dies():
    model, callback = network(), damage(epsilon=0.0, patience=3)
    history = fit(model, callback, epochs=20).history
    assert len(history["loss"]) == 3 and callback.stopped == "No group has died for 3 epochs."
    assert [record["stalled"] for record in callback.history] == [0, 1, 2, 3]


@pytest.mark.parametrize("cause", ["epsilon", "nan"])
def test_a_kernel_without_a_group_stops_and_the_model_is_intact(kind, cause, tmp_path):
    class Spoil(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.good = self.model.get_weights()
            if epoch == 2:
                kernel = self.model.get_layer("conv2").kernel
                scale = np.nan if cause == "nan" else 1e-6
                self.model.get_layer("conv2")._kernel.assign(kernel * scale)

    model, callback, spoil = network(kind), damage(path=tmp_path / "d.json"), Spoil()
    with pytest.warns(UserWarning, match="diverged.*NaN" if cause == "nan" else "No group would be left.*'conv2'"):
        history = fit(model, callback, spoil, epochs=9).history
    assert len(history["loss"]) == 3
    for now, good in zip(model.get_weights(), spoil.good, strict=True):
        np.testing.assert_array_equal(now, good)
    assert all(norm.any() for norm in norms_of(model))
    assert ("diverged" if cause == "nan" else "'conv2'") in callback.stopped
    assert json.loads((tmp_path / "d.json").read_text())["stopped"] == callback.stopped
    assert callback.history[-1]["sparsity"] == callback.history[-2]["sparsity"]


UNINTERRUPTED = {}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "interrupt", "place", "backup_first"),
    [
        ("plain", {"step": 14}, "last", True),
        ("sparse", {"epoch": 1}, "middle", True),
        pytest.param("plain", {"epoch": 1}, "middle", False, marks=slow),
        pytest.param("plain", {"epoch": 2}, "last", True, marks=slow),
        pytest.param("sparse", {"epoch": 1}, "middle", False, marks=slow),
        pytest.param("sparse", {"step": 14}, "last", False, marks=slow),
        pytest.param("sparse", {"step": 5}, "last", True, marks=slow),
    ],
    ids=str,
)
def test_resumed_runs_end_as_uninterrupted_ones(kind, interrupt, place, backup_first, tmp_path):
    """Bit for bit, weights, masks, theta and history; the interruption may come between the two callbacks."""

    def attempt(folder, *interrupts):
        model, callback = network(kind), damage(path=folder / "damage.json")
        backup = keras.callbacks.BackupAndRestore(folder / "backup")
        callbacks = [backup, callback] if backup_first else [callback, backup]
        if place == "middle":
            callbacks[1:1] = interrupts
        else:
            callbacks += interrupts
        fit(model, *callbacks, epochs=4)
        return model, callback

    if (kind, backup_first) not in UNINTERRUPTED:
        model, callback = attempt(tmp_path / "whole")
        UNINTERRUPTED[kind, backup_first] = state(model), callback.history
    weights, history = UNINTERRUPTED[kind, backup_first]
    with pytest.raises(InterruptedError):
        attempt(tmp_path / "broken", Interrupt(**interrupt))
    model, callback = attempt(tmp_path / "broken")
    assert callback.history == history
    for ours, whole in zip(state(model), weights, strict=True):
        np.testing.assert_array_equal(ours, whole)
    assert json.loads((tmp_path / "broken" / "damage.json").read_text())["history"] == history
    assert history[-1]["sparsity"] > 0.1


def test_resumed_from_a_saved_model(tmp_path):
    whole, uninterrupted = network(), damage(path=tmp_path / "whole.json")
    fit(whole, uninterrupted, epochs=4)
    model = network()
    fit(model, damage(path=tmp_path / "d.json"), epochs=2)
    model.save(tmp_path / "m.keras")
    again, callback = keras.models.load_model(tmp_path / "m.keras"), damage(path=tmp_path / "d.json")
    fit(again, callback, epochs=4, initial_epoch=2)
    assert callback.history == uninterrupted.history
    for ours, theirs in zip(state(again), state(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # The same callback goes on as well, and counts on, in a `fit` whose epochs start at 0.
    same = damage()
    model = network()
    fit(model, same, epochs=2)
    fit(model, same, epochs=2)
    assert same.history == uninterrupted.history


def test_a_resumed_run_without_its_history_is_refused(tmp_path):
    def attempt(*interrupts):
        fit(network(), keras.callbacks.BackupAndRestore(tmp_path / "backup"), damage(), *interrupts, epochs=3)

    with pytest.raises(InterruptedError):
        attempt(Interrupt(epoch=1))
    with pytest.raises(ValueError, match="`path` must name the file with the history.*step 16.*path=None"):
        attempt()


def test_a_new_run_starts_a_new_history(tmp_path):
    path = tmp_path / "d.json"
    fit(network(), damage(path=path), epochs=3)
    fit(network(), damage(path=path), epochs=1)
    content = json.loads(path.read_text())
    assert [record["epoch"] for record in content["history"]] == [0, 1]
    assert content["lambda_"] == 0.5 and content["delta"] == 0.1 and content["stopped"] is None
    assert not list(tmp_path.glob(".*"))


def test_loop_of_ones_own_ends_as_fit_does():
    model, callback = network(), damage()
    callback.start(model)
    for epoch in range(3):
        for begin in range(0, 80, 10):
            model.train_on_batch(IMAGES[begin : begin + 10], LABELS[begin : begin + 10])
        if callback.update(epoch):
            break
    callback.finish()
    other, in_fit = network(), damage()
    fit(other, in_fit, epochs=3)
    assert callback.history == in_fit.history
    for ours, theirs in zip(norms_of(model), norms_of(other)):
        np.testing.assert_array_equal(ours, theirs)


def test_report_data_and_datasets():
    """With data of its own to report on, all of `validation_data` steers, in any form `evaluate` takes."""
    import tensorflow as tf

    steering = tf.data.Dataset.from_tensor_slices((HELD_OUT[0][:25], HELD_OUT[1][:25])).batch(10)
    callback = damage(validation_data=steering, report_data=(HELD_OUT[0][25:], HELD_OUT[1][25:]))
    model = network()
    fit(model, callback, epochs=2)
    right = model.predict(HELD_OUT[0], verbose=0).argmax(-1) == HELD_OUT[1]
    assert callback.history[-1]["accuracy"] == pytest.approx(right[:25].mean())
    assert callback.history[-1]["test_accuracy"] == pytest.approx(right[25:].mean())


def test_sample_weights_and_layers(mlp):
    weighted = damage(validation_data=(*HELD_OUT, np.linspace(0, 1, 40)), include="head", granularity="channel")
    fit(network(), weighted, epochs=1)
    assert list(weighted.history[0]["layers"]) == ["head"]
    convolutions = damage(exclude="conv1")
    fit(network(), convolutions, epochs=1)
    assert list(convolutions.history[0]["layers"]) == ["conv2"]
    with pytest.raises(ValueError, match="`model` must hold a convolution"):
        damage().set_model(mlp())


def test_a_network_with_an_empty_layer_is_refused_and_left_as_it_is():
    model = network()
    layer = model.get_layer("conv2")
    layer.assign_mask(np.zeros(layer.mask.shape))
    callback = damage()
    with pytest.raises(ValueError, match="`model` must have a group left in layer 'conv2'"):
        callback.start(model)
    assert model.losses == [] and not callback.history


def test_convolutions_are_chosen_among_other_layers():
    """In a plain model, whatever else it holds; in one with sparse layers, the sparse ones."""
    inputs = keras.Input((6, 2))
    x = keras.layers.Conv1D(4, 3, name="conv")(inputs)
    x = keras.layers.LSTM(3, return_sequences=True, name="lstm")(
        keras.layers.MultiHeadAttention(2, 3, name="mha")(x, x)
    )
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    model.compile("sgd", "mse")
    callback = damage()
    callback.set_model(model)
    assert [weight.name for weight in callback._weights] == ["conv"]
    mixed = ks.sparsify(network("plain"), granularity="group", include="conv1")
    callback.set_model(mixed)
    assert [weight.name for weight in callback._weights] == ["conv1"]


def test_metrics_of_the_first_epoch_are_its_own():
    """The measurement at the start must not count into them."""
    logs = {}
    for callbacks in ([], [damage(lambda_=0.0)]):
        model = network()
        model.compile(keras.optimizers.SGD(0.0), model.loss, metrics=["accuracy"])
        logs[len(callbacks)] = fit(model, *callbacks, epochs=1).history
    assert logs[0]["accuracy"] == logs[1]["accuracy"]
    np.testing.assert_allclose(logs[0]["loss"], logs[1]["loss"], rtol=1e-6)


def test_the_users_regularizer_stays_and_a_second_theta_is_refused():
    model = network(kernel_regularizer=keras.regularizers.L2(0.1))
    callback = damage()
    own = float(sum(model.losses))
    callback.start(model)
    assert float(sum(model.losses)) > own
    callback.finish()
    assert float(sum(model.losses)) == pytest.approx(own)
    twice = network(kernel_regularizer=ks.regularizers.TruncatedGroupLasso())
    with pytest.raises(ValueError, match="no TruncatedGroupLasso of its own in layer 'conv1'"):
        damage().set_model(twice)


def test_saved_at_any_moment_what_died_is_zero_in_the_file(kind, tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch}-{batch}.weights.h5", save_freq=3, save_weights_only=True
    )
    model, callback = network(kind), damage()
    fit(model, callback, checkpoint, epochs=4)
    dead = norms_of(model)[1] == 0
    assert dead.any()
    again = network(kind)
    again.load_weights(max(tmp_path.glob("4-*.h5")))
    gone = norms_of(again)[1] == 0
    assert gone.any() and (gone <= dead).all()
