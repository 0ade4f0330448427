"""RigL and SET: what is dropped, what grows, what the optimizer remembers of it, and where a resumed run goes on."""

import math
import zlib

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.callbacks import SET, RigL

layers = keras.layers


def rigl(model, data, **options):
    options = {"end_step": 16, "begin_step": 2, "frequency": 4, "batch_size": 8, "seed": 3, **options}
    return RigL(options.pop("sparsity", 0.5), data(model), **options)


def evolutionary(model, data, **options):
    options = {"end_step": 16, "begin_step": 2, "frequency": 4, "seed": 3, **options}
    return SET(options.pop("sparsity", 0.5), **options)


METHODS = {"rigl": rigl, "set": evolutionary}


class Probe(keras.callbacks.Callback):
    """Masks, kernels and slots before and after the callback's turn at the beginning of each batch."""

    def __init__(self, method):
        super().__init__()
        self.method, self.before, self.after, self.slots, self.gradients = method, {}, {}, {}, {}

    def first(self):
        def note(batch, logs=None):
            step = int(self.method.model.optimizer.iterations)
            self.before[step] = {w.name: (w.mask(), w.kernel()) for w in self.method._weights}
            if isinstance(self.method, RigL) and step in (6, 10, 14, 16):
                batches = list(self.method._batches.take(self.method.schedule.updates_before(step)))
                self.gradients[step] = ks.gradients.loss_gradients(self.method.model, self.method._weights, batches[0])

        return keras.callbacks.LambdaCallback(on_train_batch_begin=note)

    def on_train_batch_begin(self, batch, logs=None):
        step, optimizer = int(self.model.optimizer.iterations), self.model.optimizer
        self.after[step] = {w.name: (w.mask(), w.kernel()) for w in self.method._weights}
        names = [v.path for v in self.model.trainable_variables]
        self.slots[step] = {
            w.name: [np.asarray(slots[names.index(w.variable.path)]) for slots in (optimizer._momentums,)]
            for w in self.method._weights
            if optimizer.built
        }


def share_of(name, step):
    return 0.3 if name == "set" else 0.15 * (1 + math.cos(math.pi * (step - 2) / 14))


@pytest.mark.parametrize("method", METHODS)
def test_every_update(mlp, fit, data, kind, method):
    """At the density it began with: the smallest of what was kept go, the highest of all others come, at zero."""
    model = mlp(kind)
    pruning = METHODS[method](model, data)
    probe = Probe(pruning)
    optimizer = keras.optimizers.Adam(0.05)
    fit(model, probe.first(), pruning, probe, optimizer=optimizer)
    assert [entry["step"] for entry in pruning.history] == [2, 6, 10, 14, 16]
    moved = 0
    for step in range(20):
        for index, name in enumerate(("a", "b")):
            (old, kernel), (new, after) = probe.before[step][name], probe.after[step][name]
            units = old.size
            if step < 2:
                assert old.all() and new.all()
                continue
            keep = int(new.sum())
            assert (
                keep
                == ks.allocation.get("erk" if method == "rigl" else "erdos_renyi").allocate(
                    0.5, [ks.allocation.Candidate(np.ones(s), 1, s) for s in ((6, 8), (8, 3))]
                )[index]
            )
            if step == 2:
                order = np.argsort(-ks.criteria.Random(3).scores(kernel, ks.granularity.get("weight"), name).ravel())
                np.testing.assert_array_equal(np.flatnonzero(new), np.sort(order[:keep]))
            elif step in (6, 10, 14, 16):
                stay = keep - round(share_of(method, step) * keep)
                alive = sorted(np.flatnonzero(old), key=lambda i: (-abs(kernel.flat[i]), i))[:stay]
                if method == "rigl":
                    scores = np.abs(probe.gradients[step][index]).ravel()
                else:
                    scores = np.random.default_rng([3, zlib.crc32(name.encode()), step]).random(units)
                free = sorted(set(range(units)) - set(alive), key=lambda i: (-scores[i], i))
                expected = np.zeros(units)
                expected[alive + free[: keep - stay]] = 1
                np.testing.assert_array_equal(new.ravel(), expected, err_msg=f"{step} {name}")
                moved += int((new != old).sum())
                came = (new == 1) & (old == 0)
                assert (after[came] == 0).all()
                np.testing.assert_array_equal(after[(new == 1) & (old == 1)], kernel[(new == 1) & (old == 1)])
                for slot in probe.slots[step][name]:
                    assert (slot[came] == 0).all() and (slot[(new == 1) & (old == 1)] != 0).any()
                if kind == "plain":  # a step later they have been trained
                    following = probe.before[step + 1][name][1]
                    assert not came.any() or (following[came] != 0).mean() > 0.5
            else:
                np.testing.assert_array_equal(old, new)
            assert (after[new == 0] == 0).all()
    assert moved > 10


@pytest.mark.parametrize(
    ("kind", "method", "freq"),
    [("sparse", "rigl", 6), ("plain", "rigl", 6), ("plain", "rigl", "epoch"), ("plain", "set", 6)],
)
def test_resumed_runs_go_on(mlp, data, kind, method, freq, tmp_path):
    """From a file of the end of an epoch or of an update step, written before or after the callback's turn."""

    def train(model, epochs, initial_epoch=0, callbacks=()):
        x, y = (part[: 4 * (6 if freq == 6 else 10)] for part in data(model))
        if not model.compiled:
            model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        options = {"epochs": epochs, "initial_epoch": initial_epoch, "batch_size": 4, "shuffle": False, "verbose": 0}
        model.fit(x, y, callbacks=list(callbacks), **options)

    whole, broken = mlp(kind), mlp(kind)
    epochs = 3 if freq == 6 else 2
    train(whole, epochs, callbacks=[METHODS[method](whole, data)])
    files = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(broken, epochs, callbacks=[METHODS[method](broken, data), files, Stop()])
    resumed = keras.models.load_model(tmp_path / "1.keras")
    pruning = METHODS[method](resumed, data)
    train(resumed, epochs, 1, [pruning])
    # Step 6 is an update: the file of its epoch's end holds the network before it.
    assert pruning.history[0]["step"] == (6 if freq == 6 else 10)
    for one, other in zip(whole.trainable_variables, resumed.trainable_variables):
        np.testing.assert_array_equal(np.asarray(one) == 0, np.asarray(other) == 0)
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_network_that_is_sparse_already_keeps_its_masks(mlp, fit, data):
    model = mlp()
    ks.prune(model, 0.5, allocation="erk")
    masks = {name: np.asarray(model.get_layer(name).kernel) != 0 for name in ("a", "b")}
    pruning = rigl(model, data, begin_step=0, loss="mse")
    pruning.start(model, optimizer=keras.optimizers.SGD())
    for weight in pruning._weights:
        np.testing.assert_array_equal(weight.mask() == 1, masks[weight.name])
    denser = mlp()
    ks.prune(denser, 0.75)
    pruning = evolutionary(denser, data, begin_step=0)
    pruning.start(denser, optimizer=keras.optimizers.SGD())
    assert pruning.history[0]["sparsity"] == pytest.approx(0.5, abs=0.02)  # sparser than asked for: it grows


@pytest.mark.parametrize("method", METHODS)
def test_loop_of_ones_own(mlp, data, kind, method):
    """`update(step)` changes the masks at once; with the optimizer given, new connections have no momentum."""
    model, optimizer = mlp(kind), keras.optimizers.SGD(0.1, momentum=0.9)
    pruning = METHODS[method](
        model, data, begin_step=0, frequency=3, end_step=12, **({"loss": "mse"} if method == "rigl" else {})
    )
    with pytest.raises(ValueError, match="`optimizer` must be the optimizer of the loop"):
        pruning.start(model)
    pruning.start(model, optimizer=optimizer)
    weights, generator = pruning._weights, np.random.default_rng(0)
    for step in range(1, 14):
        gradients = [generator.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
        before = [weight.mask() for weight in weights]
        pruning.update(step)
        if step in (3, 6, 9):
            assert any((weight.mask() != mask).any() for weight, mask in zip(weights, before))
            for weight, mask in zip(weights, before):
                index = [v.path for v in model.trainable_variables].index(weight.variable.path)
                momentum = np.asarray(optimizer.momentums[index])
                new = (weight.mask() == 1) & (mask == 0)
                assert (momentum[new] == 0).all() and (momentum[mask * weight.mask() == 1] != 0).all()
                assert (weight.kernel()[new] == 0).all()
    assert pruning.update(13) == pytest.approx(0.5, abs=0.02)
    pruning.finish()


@pytest.mark.parametrize("method", METHODS)
def test_structured(cnn, fit, data, method):
    """Connections of a sparse model; 2 of 4 weights of a plain one, at every step."""
    model = cnn("sparse", "connection")
    options = {"allocation": "uniform", "end_step": 8, "frequency": 3}
    pruning = METHODS[method](model, data, sparsity=0.6, **options)
    fit(model, pruning, epochs=1)
    connections = {name: np.asarray(model.get_layer(name).mask).sum() for name in ("conv", "point", "head")}
    assert connections == {"conv": 3, "point": 10, "head": 7}
    model, seen = cnn(), []
    pruning = METHODS[method](model, data, granularity="2:4", exclude="conv", **options)
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append({w.name: w.mask() for w in pruning._weights})
    )
    fit(model, pruning, note, epochs=1)
    assert any((seen[i]["point"] != seen[i - 1]["point"]).any() for i in range(4, 10))
    for masks in seen[3:]:
        for mask in masks.values():
            for start in range(0, mask.shape[-2], 4):
                assert mask[..., start : start + 4, :].sum(axis=-2).max() <= 2


def test_steps_per_execution(mlp, fit, data, kind):
    """An update takes place with the next turn of the callback, once."""
    model = mlp(kind)
    pruning = evolutionary(model, data)
    fit(model, pruning, steps_per_execution=5)
    assert [entry["step"] for entry in pruning.history] == [2, 10, 14]  # at steps 5, 10 and 15


def test_rigl_learns_more_than_masks_that_stand(mlp, data):
    """Inputs that random masks have left out are found: a target that depends on three of 24 inputs."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=(512, 24)).astype("float32")
    y = x[:, [3, 11, 17]] @ np.array([[2.0], [-1.5], [1.0]], "float32")
    losses = {}
    for method in ("static", "rigl"):
        keras.utils.set_random_seed(5)
        model = keras.Sequential([keras.Input((24,)), layers.Dense(4, name="a"), layers.Dense(1, name="b")])
        model.compile(keras.optimizers.Adam(0.02), "mse")
        options = {"include": "a", "allocation": "uniform", "seed": 2}
        if method == "rigl":
            callback = RigL(0.92, (x, y), end_step=100, frequency=10, drop_fraction=0.5, batch_size=64, **options)
        else:
            callback = SET(0.92, end_step=100, frequency=100, drop_fraction=1e-6, **options)
        model.fit(x, y, batch_size=64, epochs=20, verbose=0, shuffle=False, callbacks=[callback])
        losses[method] = model.evaluate(x, y, verbose=0)
        assert np.count_nonzero(model.get_layer("a").kernel) <= 8
    assert losses["rigl"] < 0.05 < 0.5 < losses["static"]


def test_arguments(mlp, fit, data):
    model = mlp()
    for options, error, message in (
        ({"sparsity": 1.0}, ValueError, r"`sparsity` must lie in \[0, 1\)"),
        ({"end_step": 2}, ValueError, "`end_step` must be greater than begin_step, 2"),
        ({"frequency": 20}, ValueError, "`frequency` must be at most end_step - begin_step, 14"),
        ({"drop_fraction": 0}, ValueError, r"`drop_fraction` must lie in \(0, 1\]"),
        ({"allocation": "global"}, ValueError, "`allocation` must share the target by the shapes"),
        ({"allocation": "layerwise_constant"}, ValueError, "`allocation` must share the target by the shapes"),
        ({"seed": -1}, ValueError, "`seed` must be an integer >= 0"),
    ):
        for method in METHODS.values():
            with pytest.raises(error, match=message):
                method(model, data, **options)
    with pytest.raises(TypeError, match="`data` must be arrays"):
        RigL(0.5, None, end_step=10, frequency=5)
    for method in METHODS.values():
        with pytest.raises(
            ValueError, match="`end_step` must lie within the steps of `fit`: 2 epochs of 10 .* step 20"
        ):
            fit(mlp(), method(model, data, end_step=40))
        with pytest.raises(ValueError, match="`sparsity` must be at least 0.75 for 'a', of granularity '1:4'"):
            fit(mlp(), method(model, data, granularity="1:4"))
        with pytest.raises(ValueError, match="`granularity` must be None or that of layer 'a'"):
            fit(mlp("sparse"), method(model, data, granularity=ks.granularity.block(2, 2)))
    with pytest.raises(ValueError, match="`loss` must be given where the model is not compiled"):
        rigl(model, data).start(mlp(), optimizer=keras.optimizers.SGD())
