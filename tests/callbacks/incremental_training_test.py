"""Incremental training: connections that double, how they start, what the optimizer knows of them, and resumed runs."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from interruption import Interrupt, state

import keras_sparse as ks
from keras_sparse.callbacks import IncrementalTraining
from keras_sparse.engine import training

DOUBLINGS = (0.1, 0.2, 0.4, 0.8, 1.0)


def network(granularity="connection", initializer="he_normal", widths=(9, 11, 7), named="conv", **options):
    keras.utils.set_random_seed(3)
    layers = [keras.Input((8, 8, 3))]
    for index, width in enumerate(widths):
        layers.append(
            ks.layers.SparseConv2D(
                width,
                3,
                padding="same",
                activation="tanh",
                kernel_initializer=initializer,
                granularity=granularity,
                name=f"{named}{index}",
                **options,
            )
        )
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2, name="head")]
    return keras.Sequential(layers, name="network")


def data(examples=40):
    generator = np.random.default_rng(5)
    x = generator.normal(size=(examples, 8, 8, 3)).astype("float32")
    return x, generator.normal(size=(examples, 2)).astype("float32")


def fit(model, *callbacks, optimizer=None, epochs=2, **options):
    """Ten batches an epoch."""
    x, y = data()
    if not model.compiled:
        model.compile(optimizer or keras.optimizers.SGD(0.01, momentum=0.9), "mse", **options)
    return model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))


def convolutions(model):
    return [layer for layer in model.layers if isinstance(layer, ks.layers.SparseConv2D)]


def masks_of(model):
    return {layer.name: keras.ops.convert_to_numpy(layer.mask) != 0 for layer in convolutions(model)}


def kernels_of(model):
    return {layer.name: keras.ops.convert_to_numpy(layer.kernel) for layer in convolutions(model)}


class Recorder(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        masks, kernels = masks_of(self.model), kernels_of(self.model)
        self.seen.append((int(self.model.optimizer.iterations), masks, kernels, dict(logs)))


def wanted_density(step, doubling_steps, initial=0.1, final=1.0):
    return min(final, initial * 2 ** (step // doubling_steps))


def share(masks):
    return sum(mask.sum() for mask in masks.values()) / sum(mask.size for mask in masks.values())


@pytest.mark.parametrize("final", [1.0, 0.5])
def test_density_doubles_and_tables_are_nested(final):
    model, recorder = network(), Recorder()
    growing = IncrementalTraining(0.1, doubling_steps=4, final_density=final, initializer="layer")
    history = fit(model, growing, recorder).history
    smaller = None
    for step, masks, kernels, logs in recorder.seen:
        wanted = wanted_density(step, 4, final=final)
        for name, mask in masks.items():
            # A table holds at least what a path through each of its channels needs.
            assert abs(mask.sum() - wanted * mask.size) <= max(1, max(mask.shape)), (step, name)
            assert smaller is None or not (smaller[name] & ~mask).any()
            assert not kernels[name][:, :, ~mask[0, 0]].any()
        assert logs["density"] == pytest.approx(share(masks))
        smaller = masks
    assert [entry["step"] for entry in growing.history] == ([0, 4, 8, 12, 16] if final == 1 else [0, 4, 8, 12])
    assert history["density"][-1] == pytest.approx(share(masks_of(model)))
    assert growing.history[-1]["density"] == pytest.approx(final, abs=0.02)
    assert set(growing.history[0]["layers"]) == {"conv0", "conv1", "conv2"}
    assert growing.history[0]["layers"]["conv1"] == pytest.approx(recorder.seen[0][1]["conv1"].mean())


def test_tables_are_those_of_random_tables():
    for density in (0.1, 0.2):
        model, other = network(), network()
        growing = IncrementalTraining(density, 1000, seed=4)
        growing.start(model, optimizer=keras.optimizers.SGD())
        ks.random_tables(other, density, seed=4)
        for name, mask in masks_of(other).items():
            np.testing.assert_array_equal(masks_of(model)[name], mask)


def test_no_connection_leads_nowhere_at_any_density():
    """Of a chain of convolutions: what reads a channel is there only where something writes it, and the reverse."""
    model = network(widths=(31, 29, 23))
    growing = IncrementalTraining(0.001, doubling_steps=1, seed=2)
    growing.start(model, optimizer=keras.optimizers.SGD())
    for step in range(11):
        growing.update(step)
        tables = [mask[0, 0] for mask in masks_of(model).values()]
        for table, following in zip(tables, tables[1:]):
            np.testing.assert_array_equal(table.any(0), following.any(1), err_msg=f"step {step}")
        assert tables[0].any()
    assert all(table.all() for table in tables)


# How connections start.


def before_and_after(model, **options):
    """Return the growing callback's model at density 0.25 and 0.5: masks and kernels of both."""
    growing = IncrementalTraining(0.25, doubling_steps=5, **options)
    growing.start(model, optimizer=keras.optimizers.SGD())
    before = masks_of(model), kernels_of(model)
    growing.update(5)
    return *before, masks_of(model), kernels_of(model)


def fans(mask, kernel_shape):
    """NumPy oracle, weight by weight: kept weights into the output and out of the input."""
    taps, (inputs, outputs) = int(np.prod(kernel_shape[:2])), kernel_shape[2:]
    table = mask[0, 0]
    into = np.array([[taps * table[:, j].sum() for j in range(outputs)] for _ in range(inputs)], "float64")
    out = np.array([[taps * table[i, :].sum() for _ in range(outputs)] for i in range(inputs)], "float64")
    return into, out


FAN = {
    "he_normal": lambda into, out: into,
    "lecun_uniform": lambda into, out: into,
    "glorot_uniform": lambda into, out: (into + out) / 2,
    keras.initializers.VarianceScaling(mode="fan_out"): lambda into, out: out,
}


@pytest.mark.parametrize("initializer", FAN, ids=lambda i: i if isinstance(i, str) else "fan_out")
def test_the_first_table_keeps_the_weights_at_the_variance_of_its_fan(initializer):
    model = network(initializer=initializer)
    whole = kernels_of(model)
    masks, kernels, *_ = before_and_after(model)
    for name, mask in masks.items():
        dense = FAN[initializer](*fans(np.ones_like(mask), whole[name].shape))
        sparse = FAN[initializer](*fans(mask, whole[name].shape))
        wanted = whole[name] * np.sqrt(dense / np.maximum(sparse, 1)) * mask
        np.testing.assert_allclose(kernels[name], wanted, rtol=1e-6)


def test_weights_without_a_fan_stay_as_they_are():
    model = network(initializer="random_normal")
    whole = kernels_of(model)
    masks, kernels, *_ = before_and_after(model)
    for name, mask in masks.items():
        np.testing.assert_array_equal(kernels[name], whole[name] * mask)


def test_zeros_change_nothing_that_the_network_computes():
    model, (x, _) = network(), data()
    growing = IncrementalTraining(0.1, doubling_steps=5)
    growing.start(model, optimizer=keras.optimizers.SGD())
    outputs = model.predict(x, verbose=0)
    for step in (5, 10, 15, 20):
        assert growing.update(step) > 0.15
        np.testing.assert_allclose(model.predict(x, verbose=0), outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("initializer", "fan"),
    [
        ("layer", "he_normal"),
        ("glorot_uniform", "glorot_uniform"),
        (keras.initializers.HeNormal(seed=3), "he_normal"),
        ("random_normal", None),
    ],
)
def test_new_connections_have_the_variance_of_their_fan(initializer, fan):
    widths = (16, 150, 140)
    masks, kernels, grown, values = before_and_after(network(widths=widths), initializer=initializer)
    for name in ("conv1", "conv2"):
        new = grown[name] & ~masks[name]
        assert new.any()
        kept = np.broadcast_to(masks[name], kernels[name].shape)
        np.testing.assert_array_equal(values[name][kept], kernels[name][kept])  # the others are left alone
        if fan is None:
            expected = np.full(new.shape, 0.05)
        else:
            variance = (2 if fan == "he_normal" else 1) / FAN[fan](*fans(grown[name], kernels[name].shape))
            expected = np.sqrt(np.where(grown[name], variance, 1))
        standard = (values[name] / expected)[np.broadcast_to(new, kernels[name].shape)]
        # Standard errors of mean and standard deviation of n numbers are about 1 / sqrt(n) and 0.7 / sqrt(n).
        assert abs(standard.mean()) < 4 / np.sqrt(standard.size)
        assert abs(standard.std() - 1) < 4 / np.sqrt(standard.size)


def test_new_weights_follow_from_the_seed_and_the_place():
    def values(seed, named="conv"):
        model = network(named=named)
        return list(before_and_after(model, initializer="layer", seed=seed)[3].values())

    runs = [values(1), values(1, named="other"), values(2)]
    for one, same, other in zip(*runs):
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()
    assert (runs[0][1][:, :, :7, :7] != runs[0][2][:, :, :7, :7]).any()  # layers differ


# What the optimizer knows of new connections.


class Rate(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule without a configuration."""

    def __call__(self, step):
        return 0.01


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw with averages": lambda: keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.9),
    "adagrad": lambda: keras.optimizers.Adagrad(Rate(), initial_accumulator_value=0.3),
    "ftrl": lambda: keras.optimizers.Ftrl(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(lambda: 0.01, momentum=0.5, centered=True),
    "adadelta accumulating": lambda: keras.optimizers.Adadelta(0.5, gradient_accumulation_steps=3),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "loss scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizer_forgets_new_connections_alone(optimizer):
    """It has trained all connections before, so that there is something to forget."""
    model = network()
    optimizer = optimizer()
    variable = model.get_layer("conv1")._kernel
    generator = np.random.default_rng(0)
    for _ in range(4):
        gradients = [generator.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    growing = IncrementalTraining(0.25, doubling_steps=5, initializer="layer")
    growing.start(model, optimizer=optimizer)
    before = masks_of(model)["conv1"]
    # Every slot of the kernel's shape whose name is the kernel's, whichever attribute holds it.
    name = variable.path.replace("/", "_")
    own = [v for v in inner.variables if v.shape == variable.shape and f"/{name}_" in f"/{v.path}"]
    known = [keras.ops.convert_to_numpy(v) for v in own]
    assert own and all((value != 0).any() for value in known)
    growing.update(5)
    new = np.broadcast_to(masks_of(model)["conv1"] & ~before, variable.shape)
    initial = {"accumulator": 0.3 if isinstance(inner, keras.optimizers.Adagrad) else 0.1}
    for slot, value in zip(own, known, strict=True):
        kind = slot.path.split(name + "_")[1]
        wanted = (
            keras.ops.convert_to_numpy(variable)
            if kind == "average"
            else np.full(variable.shape, initial.get(kind, 0.0))
        )
        np.testing.assert_allclose(keras.ops.convert_to_numpy(slot)[new], wanted[new], rtol=1e-6, err_msg=slot.path)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(slot)[~new], value[~new], err_msg=slot.path)


def test_one_optimizer_of_several():
    model = network()
    both = [keras.optimizers.SGD(0.01, momentum=0.9), keras.optimizers.Adam(0.01)]
    selector = keras.optimizers.OptimizerMap(both[0], {".*conv1.*": both[1]})
    optimizer = keras.optimizers.MultiOptimizer(selector)
    generator = np.random.default_rng(0)
    gradients = [generator.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    growing = IncrementalTraining(0.25, doubling_steps=5)
    growing.start(model, optimizer=optimizer)
    before = masks_of(model)
    growing.update(5)
    for name, inner in (("conv0", both[0]), ("conv1", both[1])):
        variable = model.get_layer(name)._kernel
        new = np.broadcast_to(masks_of(model)[name] & ~before[name], variable.shape)
        states = [keras.ops.convert_to_numpy(v) for v in inner.variables if v.shape == variable.shape]
        assert states
        for slot in states:
            assert not slot[new].any() and slot[~new].all()


# Steps, whatever bundles them.


@pytest.mark.parametrize("bundled", [3, 7])
def test_steps_per_execution(bundled):
    model, recorder = network(), Recorder()
    growing = IncrementalTraining(0.1, doubling_steps=4)
    fit(model, growing, recorder, steps_per_execution=bundled)
    for step, masks, _, _ in recorder.seen:
        assert share(masks) == pytest.approx(wanted_density(step, 4), abs=0.06)
    assert masks_of(model)["conv1"].all()


def test_gradient_accumulation():
    model, recorder = network(), Recorder()
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9, gradient_accumulation_steps=2)
    growing = IncrementalTraining(0.1, doubling_steps=2)
    fit(model, growing, recorder, optimizer=optimizer)
    assert [step for step, *_ in recorder.seen] == [i // 2 for i in range(1, 21)]
    for step, masks, _, _ in recorder.seen:
        assert share(masks) == pytest.approx(wanted_density(step, 2), abs=0.06)


# Resumed runs (invariant 2).


@pytest.mark.parametrize(("initializer", "first"), [("zeros", False), ("layer", True)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(initializer, first, tmp_path):
    """Bit for bit. The backup of step 10 is written after the update of step 10, and holds no other state."""

    def run(folder, *interrupts):
        keras.backend.clear_session()
        model = network(widths=(5, 6))
        model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.01, use_ema=True), "mse")
        growing = IncrementalTraining(0.1, doubling_steps=5, initializer=initializer)
        backup = keras.callbacks.BackupAndRestore(folder)
        callbacks = [backup, growing] if first else [growing, backup]
        fit(model, *callbacks, *interrupts, epochs=3)
        return model, growing

    with pytest.raises(InterruptedError):
        run(tmp_path / "a", Interrupt(16))
    assert json.loads((tmp_path / "a" / "training_metadata.json").read_text())["epoch"] == 1
    resumed, growing = run(tmp_path / "a")
    assert growing.history[0]["step"] == 10
    whole, _ = run(tmp_path / "b")
    for ours, theirs in zip(state(resumed), state(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert all(mask.all() for mask in masks_of(resumed).values())


def test_a_file_from_before_the_update_of_its_step_makes_up_for_it(tmp_path):
    """As one that `BackupAndRestore(save_freq=1)` writes, where it stands before this callback."""

    def grown(model, optimizer):
        growing = IncrementalTraining(0.1, doubling_steps=5, initializer="layer")
        growing.start(model, optimizer=optimizer)
        return growing

    model = network()
    optimizer = keras.optimizers.Adam(0.01)
    growing = grown(model, optimizer)
    generator = np.random.default_rng(0)
    for _ in range(5):
        gradients = [generator.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
    model.save_weights(tmp_path / "m.weights.h5")
    growing.update(5)
    again = network()
    again.load_weights(tmp_path / "m.weights.h5")
    late = IncrementalTraining(0.1, doubling_steps=5, initializer="layer")
    late.start(again, step=5, optimizer=keras.optimizers.Adam(0.01))
    for name, kernel in kernels_of(model).items():
        np.testing.assert_array_equal(kernels_of(again)[name], kernel)


def test_a_saved_model_goes_on_growing(tmp_path):
    model = network()
    growing = IncrementalTraining(0.1, doubling_steps=5, final_density=0.2)
    fit(model, growing, epochs=1)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    before = masks_of(model)
    for name, mask in masks_of(again).items():
        np.testing.assert_array_equal(mask, before[name])
    fit(again, IncrementalTraining(0.1, doubling_steps=5, final_density=0.8), epochs=1)
    for name, mask in masks_of(again).items():
        assert not (before[name] & ~mask).any()
    assert share(masks_of(again)) == pytest.approx(0.8, abs=0.02)


# Loops of one's own.


@pytest.mark.parametrize("graph", [True, False], ids=["tf.function", "eager"])
def test_loop_of_ones_own(graph):
    model, growing = network(), IncrementalTraining(0.1, doubling_steps=3, initializer="layer")
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    x, y = data(8)
    traces = []

    def train_step(inputs, targets):
        traces.append(1)
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((model(inputs, training=True) - targets) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    train_step = tf.function(train_step) if graph else train_step
    assert growing.start(model, optimizer=optimizer) == pytest.approx(0.1, abs=0.06)
    for step in range(1, 14):
        train_step(tf.constant(x), tf.constant(y))
        assert growing.update(step) == pytest.approx(wanted_density(step, 3), abs=0.06)
    growing.finish()
    assert all(mask.all() for mask in masks_of(model).values())
    assert len(traces) == (1 if graph else 13)
    with pytest.raises(RuntimeError, match="Call `start"):
        growing.update(14)


def test_a_compiled_model_brings_its_optimizer():
    model = network()
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    growing = IncrementalTraining(0.1, doubling_steps=3)
    assert growing.start(model, step=3) == pytest.approx(0.2, abs=0.06)
    assert [entry["step"] for entry in growing.history] == [3]


# Speed: which routine runs, and what is traced.


@pytest.mark.skipif(not ks.ops.is_available(), reason="the compiled ops are missing")
def test_sparse_steps_run_sparse_and_nothing_is_traced_again(monkeypatch):
    """16 channels on 24x24 pixels: the break-even lies between densities 0.4 and 0.8."""
    ran, traced = [], []
    product = training._connection

    def recorded(inputs, *arguments):
        with tf.control_dependencies([tf.py_function(lambda: ran.append(1), [], [])]):
            return product(tf.identity(inputs), *arguments)

    monkeypatch.setattr(training, "_connection", recorded)

    @keras.saving.register_keras_serializable("tests")
    class CountTraces(keras.layers.Layer):
        def call(self, inputs):
            traced.append(1)
            return inputs

    sparse = ks.layers.SparseConv2D(16, 3, padding="same", name="sparse")
    layers = [keras.Input((24, 24, 16)), sparse, CountTraces(), keras.layers.GlobalAveragePooling2D()]
    model = keras.Sequential([*layers, keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    counts = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            counts.append((int(self.model.optimizer.iterations), len(ran), len(traced)))

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(160, 24, 24, 16)).astype("float32"), generator.normal(size=(160, 2))
    growing = IncrementalTraining(0.1, doubling_steps=4)
    model.fit(x, y, batch_size=8, callbacks=[growing, Count()], verbose=0)
    assert share(masks_of(model)) == 1
    steps, sparse_steps, traces = zip(*counts)
    limit = training.break_even((3, 3, 16, 16), 8 * 24 * 24)
    assert 0.4 < limit < 0.8
    # Step s computes with the density that the update of step s - 1 left.
    wanted = np.cumsum([wanted_density(step - 1, 4) < limit for step in steps])
    assert list(sparse_steps) == wanted.tolist()
    assert len(set(traces)) == 1


# What cannot grow.


def test_foreign_masks_are_an_error():
    model = network()
    ks.random_tables(model, 0.3, seed=1)
    growing = IncrementalTraining(0.4, doubling_steps=5, seed=2)
    with pytest.raises(ValueError, match=r"`seed` must .*'conv0'.* Received: seed=2"):
        growing.start(model, optimizer=keras.optimizers.SGD())
    growing = IncrementalTraining(0.4, doubling_steps=5, seed=1)
    growing.start(model, optimizer=keras.optimizers.SGD())  # of the same seed


def test_a_density_too_low_for_paths_warns():
    model, growing = network(), IncrementalTraining(0.001, doubling_steps=5)
    with pytest.warns(
        UserWarning, match=r"density=0.001 is too low for 3 of 3 layers.* up to 0.3333 of them in 'conv0'"
    ):
        density = growing.start(model, optimizer=keras.optimizers.SGD())
    assert density == pytest.approx(share(masks_of(model)))
    assert density == pytest.approx((9 + 11 + 11) / (27 + 99 + 77))


def test_a_denser_table_stays():
    model = network()
    ks.random_tables(model, 0.5, seed=0)
    before = masks_of(model)
    growing = IncrementalTraining(0.1, doubling_steps=5)
    growing.start(model, optimizer=keras.optimizers.SGD())
    growing.update(5)
    for name, mask in masks_of(model).items():
        np.testing.assert_array_equal(mask, before[name])
    growing.update(15)
    assert share(masks_of(model)) == pytest.approx(0.8, abs=0.02)


MIRRORED = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, numpy as np
import keras_sparse as ks

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
generator = np.random.default_rng(1)
x, y = generator.normal(size=(80, 6, 6, 4)), generator.normal(size=(80, 3))
with strategy.scope():
    conv = ks.layers.SparseConv2D(8, 3, name="a")
    model = keras.Sequential([keras.Input((6, 6, 4)), conv, keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.01, use_ema=True), "mse")

class Check(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        mask = np.asarray(conv.mask)
        replicas = strategy.experimental_local_results(conv._kernel.value)
        assert len(replicas) == 2
        for replica in replicas:
            assert not np.asarray(replica)[:, :, ~(mask != 0)[0, 0]].any()
        np.testing.assert_array_equal(*map(np.asarray, replicas))

growing = ks.callbacks.IncrementalTraining(0.25, doubling_steps=4, initializer="layer")
history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[growing, Check()]).history
assert [entry["step"] for entry in growing.history] == [0, 4, 8]
assert history["density"] == [1.0, 1.0], history
print("grown")
"""


@pytest.mark.slow
def test_mirrored_strategy(run_python):
    """Two replicas: every copy of a kernel is the same, and sparse, after every step."""
    assert run_python(MIRRORED).strip().endswith("grown")
