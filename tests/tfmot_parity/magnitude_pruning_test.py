"""Agreement with tensorflow-model-optimization 0.8.1, and every difference from it.

The same: the values of `PolynomialDecay` and `ConstantSparsity` from `begin_step` on; which weights of a kernel go,
given its values and a sparsity; the masks and weights of whole trainings, step by step.

Different, each asserted below:

1. Step t comes one batch later here. TFMOT counts a step up and then updates the masks inside the forward pass of
   batch t, that is after t - 1 updates of the weights; `GradualPruning` does so after t, as `optimizer.iterations`
   counts. TFMOT's schedule with steps b to e is ours with b - 1 to e - 1.
2. `begin_step=0` prunes before the first batch here. TFMOT never sees step 0: its first update is at `frequency`.
3. `end_step` is always an update here. TFMOT updates only at `begin_step + k * frequency`; where `frequency` does not
   divide the interval, it never reaches `final_sparsity`. It takes a `frequency` longer than the interval, which we
   refuse.
4. Before `begin_step` a schedule's value is 0 here; TFMOT's gives `initial_sparsity` and says beside it that nothing
   is due.
5. TFMOT keeps its own count of steps in the layer, from 0 when the layer is wrapped. Ours are the optimizer's, which
   go on over a second `fit` and start anew when the model is compiled again.
6. Masks are nested here: what is pruned stays so under a rising sparsity. In TFMOT the optimizer moves pruned weights,
   which are set to zero again only in the next forward pass; at an update of the masks, one that moved far enough
   comes back.
7. So a file that TFMOT writes within an epoch holds pruned weights that are not zero; none does here, whenever it is
   written.
8. The number of kept weights is exact here. TFMOT keeps all that equal the smallest kept one: of equal weights, all.
9. Both keep round(size * (1 - sparsity)), half to even, and at least one. TFMOT computes it in float32: the two may be
   one apart where the product is half a weight from a whole number, and more in kernels of over 2**24 weights.
10. With `steps_per_execution=k` TFMOT updates masks within an execution, at the very step; callbacks see every k-th
    step only, and ours makes up for what fell due since, with the sparsity of that step.
11. Both prune kernels, recurrent kernels, embeddings and pointwise kernels, and leave depthwise ones alone. TFMOT goes
    by a table of layers, and asks any other for `get_prunable_weights()`; ours by the names of weights, in any layer.
"""

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.tfmot
tfmot = pytest.importorskip("tensorflow_model_optimization")
tf_keras = pytest.importorskip("tf_keras")

import tensorflow as tf  # noqa: E402
from tensorflow_model_optimization.python.core.sparsity.keras import prune_registry, pruning_impl  # noqa: E402

import keras_sparse as ks  # noqa: E402

theirs = tfmot.sparsity.keras
ours = ks.schedules

POLYNOMIALS = [
    {"initial_sparsity": 0.0, "final_sparsity": 0.8, "begin_step": 0, "end_step": 40, "frequency": 4},
    {"initial_sparsity": 0.5, "final_sparsity": 0.9, "begin_step": 7, "end_step": 37, "frequency": 10},
    {"initial_sparsity": 0.1, "final_sparsity": 0.95, "begin_step": 3, "end_step": 33, "power": 1, "frequency": 1},
    {"initial_sparsity": 0.0, "final_sparsity": 0.7, "begin_step": 5, "end_step": 15, "power": 2, "frequency": 5},
    {"initial_sparsity": 0.25, "final_sparsity": 0.5, "begin_step": 1, "end_step": 45, "power": 5, "frequency": 11},
    {"initial_sparsity": 0.9, "final_sparsity": 0.3, "begin_step": 2, "end_step": 22, "power": 3, "frequency": 20},
]
CONSTANTS = [
    {"target_sparsity": 0.5, "begin_step": 0, "end_step": -1, "frequency": 7},
    {"target_sparsity": 0.9, "begin_step": 11, "end_step": 31, "frequency": 10},
    {"target_sparsity": 0.25, "begin_step": 4, "end_step": 4, "frequency": 3},
]
PAIRS = [("PolynomialDecay", options) for options in POLYNOMIALS] + [("ConstantSparsity", o) for o in CONSTANTS]


# Schedules.


def fires(schedule, last=60):
    """The steps at which masks change."""
    if isinstance(schedule, ours.Schedule):
        return [t for t in range(last) if schedule.update_step(t) == t]
    return [t for t in range(last) if bool(schedule(tf.constant(t, tf.int64))[0])]


def value(schedule, step):
    return float(schedule(tf.constant(step, tf.int64))[1])


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=str)
def test_schedules_agree_from_begin_step_on(name, options):
    mine, other = getattr(ours, name)(**options), getattr(theirs, name)(**options)
    for step in range(options["begin_step"], 60):
        assert mine(step) == pytest.approx(value(other, step), abs=1e-6), step
    assert fires(mine) == fires(other)


def test_before_begin_step():
    """Difference 4."""
    options = {"initial_sparsity": 0.25, "final_sparsity": 0.5, "begin_step": 8, "end_step": 20, "frequency": 4}
    mine, other = ours.PolynomialDecay(**options), theirs.PolynomialDecay(**options)
    assert [mine(t) for t in (0, 7, 8)] == [0.0, 0.0, 0.25]
    assert [value(other, t) for t in (0, 7, 8)] == [0.25, 0.25, 0.25]
    assert value(theirs.ConstantSparsity(0.5, 8), 0) == 0.5 and ours.ConstantSparsity(0.5, 8)(0) == 0.0
    assert not bool(other(tf.constant(7, tf.int64))[0]) and mine.update_step(7) is None


def test_end_step_that_frequency_does_not_divide():
    """Difference 3."""
    options = {"initial_sparsity": 0.0, "final_sparsity": 0.8, "begin_step": 2, "end_step": 13, "frequency": 4}
    mine, other = ours.PolynomialDecay(**options), theirs.PolynomialDecay(**options)
    assert fires(other) == [2, 6, 10] and fires(mine) == [2, 6, 10, 13]
    assert value(other, 10) == pytest.approx(0.8 * (1 - (3 / 11) ** 3)) and mine(13) == 0.8
    assert fires(theirs.ConstantSparsity(0.5, 2, 13, 4)) == [2, 6, 10]
    assert fires(ours.ConstantSparsity(0.5, 2, 13, 4)) == [2, 6, 10, 13]
    assert fires(theirs.PolynomialDecay(0.0, 0.8, 2, 13, frequency=100)) == [2]
    with pytest.raises(ValueError, match="`frequency` must be at most end_step - begin_step, 11"):
        ours.PolynomialDecay(0.0, 0.8, 2, 13, frequency=100)


# Masks of given weights.


def their_mask(kernel, sparsity):
    """TFMOT's mask, from its own code."""
    weight, mask = tf.Variable(kernel), tf.Variable(tf.ones_like(kernel))
    schedule = theirs.ConstantSparsity(sparsity, 0, frequency=1)
    variables = [(weight, mask, tf.Variable(0.0))]
    pruning = pruning_impl.Pruning(lambda: tf.constant(0, tf.int64), variables, schedule, (1, 1), "AVG")
    pruning.conditional_mask_update()
    return mask.numpy()


def our_mask(kernel, sparsity, previous=None):
    granularity = ks.granularity.get("weight")
    scores = ks.criteria.Magnitude().scores(kernel, granularity)
    return granularity.mask(scores, ks.allocation.units_to_keep(scores.size, sparsity), previous)


@pytest.mark.parametrize("shape", [(7,), (13, 11), (3, 3, 4, 6), (2, 3, 3, 2, 2)], ids=str)
def test_masks_of_the_same_weights_agree(shape):
    shape = shape if len(shape) > 1 else (1, *shape)
    kernel = np.random.default_rng(0).normal(size=shape).astype("float32")
    for sparsity in (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.625, 0.8, 0.9, 0.99, 0.999):
        np.testing.assert_array_equal(our_mask(kernel, sparsity), their_mask(kernel, sparsity), err_msg=str(sparsity))


def test_masks_along_the_same_weights_agree():
    """A trajectory of weights, zero where they were pruned: nested on both sides."""
    generator, mask = np.random.default_rng(1), np.ones((9, 8), "float32")
    schedule = ours.PolynomialDecay(0.0, 0.9, 0, 20, frequency=2)
    for step in range(0, 22, 2):
        kernel = generator.normal(size=mask.shape).astype("float32") * mask
        mask = our_mask(kernel, schedule(step), mask)
        np.testing.assert_array_equal(mask, their_mask(kernel, schedule(step)), err_msg=str(step))
    assert mask.sum() == 7


def test_equal_weights():
    """Difference 8."""
    kernel = np.array([[2.0, -1.0, 1.0, 1.0, -3.0, 1.0]], "float32")
    np.testing.assert_array_equal(our_mask(kernel, 0.5), [[1, 1, 0, 0, 1, 0]])
    np.testing.assert_array_equal(their_mask(kernel, 0.5), [[1, 1, 1, 1, 1, 1]])
    zeros = np.array([[0.0, 5.0, 0.0, 0.0]], "float32")
    np.testing.assert_array_equal(our_mask(zeros, 0.25), [[1, 1, 1, 0]])
    np.testing.assert_array_equal(their_mask(zeros, 0.25), [[1, 1, 1, 1]])


def their_count(size, sparsity):
    """The count as TFMOT's `_update_mask` computes it."""
    kept = tf.cast(size, tf.float32) * (1 - tf.constant(sparsity, tf.float32))
    return int(tf.cast(tf.maximum(tf.round(kept), 1), tf.int32))


def test_number_of_kept_weights():
    """Difference 9."""
    for size, sparsity in ((10, 0.45), (50, 0.35), (7, 0.999), (300, 0.815)):
        assert their_mask(np.arange(1.0, size + 1, dtype="float32")[None], sparsity).sum() == their_count(
            size, sparsity
        )
    sizes = np.arange(1, 3001)
    differing = 0
    for percent in range(0, 1000, 5):
        sparsity = percent / 1000
        kept = np.maximum(np.round(sizes.astype("float32") * (np.float32(1) - np.float32(sparsity))), 1)
        mine = np.array([ks.allocation.units_to_keep(int(size), sparsity) for size in sizes])
        off = sizes[mine != kept]
        differing += off.size
        assert (np.abs(mine - kept) <= 1).all()
        assert (np.abs(off * (1000 - percent) % 1000 - 500) == 0).all()  # half a weight, in exact arithmetic
    assert 0 < differing < 0.01 * 200 * sizes.size
    size = 25088 * 4096  # of VGG-16's first dense layer
    assert ks.allocation.units_to_keep(size, 0.9) == 10276045
    assert 0 < abs(their_count(size, 0.9) - 10276045) < 10


# Trainings in lock-step.


def their_model(conv, schedule, weights, optimizer=None, **options):
    parts = tf_keras.layers
    if conv:
        body = [
            parts.Conv2D(4, 3, activation="tanh", input_shape=(5, 5, 2)),
            parts.Conv2D(6, 1, activation="tanh"),
            parts.GlobalAveragePooling2D(),
            parts.Dense(3),
        ]
    else:
        body = [parts.Dense(8, "tanh", input_shape=(6,)), parts.Dense(3)]
    model = tf_keras.Sequential(body)
    model.set_weights(weights)
    model = theirs.prune_low_magnitude(model, pruning_schedule=schedule)
    model.compile(optimizer or tf_keras.optimizers.SGD(0.1), "mse", **options)
    return model


def our_model(conv, kind, optimizer=None, **options):
    keras.utils.set_random_seed(0)
    parts = keras.layers
    if conv:
        body = [
            keras.Input((5, 5, 2)),
            parts.Conv2D(4, 3, activation="tanh"),
            parts.Conv2D(6, 1, activation="tanh"),
            parts.GlobalAveragePooling2D(),
            parts.Dense(3),
        ]
    else:
        body = [keras.Input((6,)), parts.Dense(8, "tanh"), parts.Dense(3)]
    model = keras.Sequential(body)
    model = model if kind == "plain" else ks.sparsify(model, granularity="weight")
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse", **options)
    return model


def data(conv):
    generator = np.random.default_rng(3)
    x = generator.normal(size=(40, 5, 5, 2) if conv else (40, 6)).astype("float32")
    return x, generator.normal(size=(40, 3)).astype("float32")


def pruned_variables(model):
    """TFMOT's (kernel, mask, threshold) of every layer that it prunes."""
    return [variables for layer in model.layers for variables in getattr(layer, "pruning_vars", [])]


class TheirRecord(tf_keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.masks, self.kernels = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.kernels.append([kernel.numpy() for kernel, _, _ in pruned_variables(self.model)])
        self.masks.append([mask.numpy() for _, mask, _ in pruned_variables(self.model)])


class OurRecord(keras.callbacks.Callback):
    def __init__(self, pruning):
        super().__init__()
        self.pruning, self.masks, self.kernels = pruning, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.masks.append([weight.mask() for weight in self.pruning._weights])
        self.kernels.append([weight.kernel() for weight in self.pruning._weights])


def train_theirs(schedule, weights, conv=False, epochs=2, record=None, **options):
    model, record = their_model(conv, schedule, weights, **options), TheirRecord()
    x, y = data(conv)
    callbacks = [theirs.UpdatePruningStep(), record]
    model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model, record


def train_ours(schedule, model, conv=False, epochs=2):
    pruning = ks.callbacks.GradualPruning(schedule)
    record = OurRecord(pruning)
    x, y = data(conv)
    model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[pruning, record])
    return record


def initial_weights(conv):
    return our_model(conv, "plain").get_weights()


@pytest.mark.parametrize("conv", [False, True], ids=["dense", "convolutions"])
@pytest.mark.parametrize("kind", ["plain", "sparse"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PolynomialDecay", {"initial_sparsity": 0.0, "final_sparsity": 0.85, "begin_step": 3, "end_step": 19}),
        ("ConstantSparsity", {"target_sparsity": 0.5, "begin_step": 7, "end_step": 11}),
    ],
)
def test_trainings_in_lock_step(conv, kind, name, options):
    """Difference 1 apart: with all steps one less here, masks and weights are TFMOT's after every batch.

    With a learning rate small enough, that is, for no pruned weight to come back in TFMOT (difference 6).
    """
    earlier = {**options, "begin_step": options["begin_step"] - 1, "end_step": options["end_step"] - 1}
    weights, learning_rate = initial_weights(conv), 0.01
    _, other = train_theirs(
        getattr(theirs, name)(**options, frequency=4), weights, conv, optimizer=tf_keras.optimizers.SGD(learning_rate)
    )
    model = our_model(conv, kind, keras.optimizers.SGD(learning_rate))
    mine = train_ours(getattr(ours, name)(**earlier, frequency=4), model, conv)
    updates = 0
    for batch in range(19):  # after batch n here as within batch n + 1 there
        for ours_now, theirs_next in zip(mine.masks[batch], other.masks[batch + 1], strict=True):
            np.testing.assert_array_equal(ours_now, theirs_next, err_msg=str(batch))
        updates += batch > 0 and any((a != b).any() for a, b in zip(mine.masks[batch], mine.masks[batch - 1]))
    assert updates == (4 if name == "PolynomialDecay" else 1)  # at 0 nothing is pruned, or: one for all
    for batch in range(20):
        masks = mine.masks[batch - 1] if batch else [np.ones_like(mask) for mask in mine.masks[0]]
        for kernel, reference, mask in zip(mine.kernels[batch], other.kernels[batch], masks, strict=True):
            now = mask * (kernel != 0)  # an update at the end of this batch is TFMOT's of the next
            np.testing.assert_allclose(kernel * now, reference * now, rtol=1e-5, atol=1e-6)


def test_same_steps_are_one_batch_apart():
    """Difference 1, on its own: at a step of the same number, TFMOT has one update of the weights less."""
    options = {"target_sparsity": 0.5, "begin_step": 6, "end_step": 6, "frequency": 1}
    _, other = train_theirs(theirs.ConstantSparsity(**options), initial_weights(False))
    mine = train_ours(ours.ConstantSparsity(**options), our_model(False, "plain"))
    dense = [mask.size for mask in mine.masks[0]]
    half = [size // 2 for size in dense]
    assert [[int(mask.sum()) for mask in masks] for masks in other.masks[4:7]] == [dense, half, half]
    assert [[int(mask.sum()) for mask in masks] for masks in mine.masks[4:7]] == [dense, half, half]
    before = other.kernels[4][0]  # after batch 5
    np.testing.assert_array_equal(other.masks[5][0], our_mask(before, 0.5))
    np.testing.assert_allclose(mine.kernels[4][0], before, rtol=1e-5)
    after = mine.kernels[5][0]  # after batch 6, and pruned
    assert (np.abs(after[after != 0]).min() > 0) and (after != 0).sum() == 24


def test_begin_step_zero():
    """Difference 2."""
    options = {"target_sparsity": 0.5, "begin_step": 0, "frequency": 4}
    _, other = train_theirs(theirs.ConstantSparsity(**options), initial_weights(False), epochs=1)
    mine = train_ours(ours.ConstantSparsity(**options), our_model(False, "plain"), epochs=1)
    assert [int(masks[0].sum()) for masks in other.masks] == [48] * 3 + [24] * 7
    assert [int(masks[0].sum()) for masks in mine.masks] == [24] * 10


def test_final_sparsity_of_a_training():
    """Difference 3, in a training."""
    options = {"initial_sparsity": 0.0, "final_sparsity": 0.75, "begin_step": 2, "end_step": 13, "frequency": 4}
    _, other = train_theirs(theirs.PolynomialDecay(**options), initial_weights(False))
    mine = train_ours(ours.PolynomialDecay(**options), our_model(False, "plain"))
    assert other.masks[-1][0].sum() == round(48 * (1 - 0.75 * (1 - (3 / 11) ** 3))) == 13
    assert mine.masks[-1][0].sum() == 12


def test_steps_of_a_second_fit():
    """Difference 5."""
    x, y = data(False)
    options = {"target_sparsity": 0.5, "begin_step": 5, "frequency": 100}
    model = our_model(False, "plain")
    model.fit(x, y, batch_size=4, verbose=0)
    weights, optimizer = model.get_weights(), tf_keras.optimizers.SGD(0.1)
    other = their_model(False, theirs.ConstantSparsity(**options), weights, optimizer)
    optimizer.iterations.assign(10)
    record = TheirRecord()
    other.fit(x, y, batch_size=4, verbose=0, callbacks=[theirs.UpdatePruningStep(), record])
    assert [int(masks[0].sum()) for masks in record.masks] == [48] * 4 + [24] * 6
    mine = train_ours(ours.ConstantSparsity(**options), model, epochs=1)
    assert [int(masks[0].sum()) for masks in mine.masks] == [24] * 10  # step 5 is past
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.set_weights(weights)
    mine = train_ours(ours.ConstantSparsity(**options), model, epochs=1)
    assert [int(masks[0].sum()) for masks in mine.masks] == [48] * 4 + [24] * 6


def test_pruned_weights_stay_pruned():
    """Difference 6: a constant sparsity with an update every step, at a learning rate that moves weights far."""
    options = {"target_sparsity": 0.5, "begin_step": 1, "frequency": 1}
    _, other = train_theirs(
        theirs.ConstantSparsity(**options), initial_weights(False), optimizer=tf_keras.optimizers.SGD(0.5)
    )
    mine = train_ours(ours.ConstantSparsity(**options), our_model(False, "plain", keras.optimizers.SGD(0.5)))
    came_back = [(now[0] > before[0]).sum() for before, now in zip(other.masks, other.masks[1:])]
    assert sum(came_back) > 0
    assert all((now[0] == mine.masks[0][0]).all() for now in mine.masks)


@pytest.mark.parametrize("kind", ["plain", "sparse"])
def test_zeros_within_an_epoch(kind):
    """Difference 7: TFMOT's pruned weights are zero at the end of an epoch, ours after every batch."""
    model, other = train_theirs(theirs.ConstantSparsity(0.5, 2, frequency=100), initial_weights(False))
    mine = train_ours(ours.ConstantSparsity(0.5, 2), our_model(False, kind))
    for batch in range(2, 20):
        assert (other.kernels[batch][0][other.masks[batch][0] == 0] != 0).any()
        assert (mine.kernels[batch][0][mine.masks[batch][0] == 0] == 0).all()
    kernel, mask, _ = pruned_variables(model)[0]
    assert (kernel.numpy()[mask.numpy() == 0] == 0).all()


def test_steps_per_execution():
    """Difference 10: the counts are the same, of weights of other steps."""
    options = {"initial_sparsity": 0.0, "final_sparsity": 0.75, "begin_step": 2, "end_step": 14, "frequency": 4}
    _, other = train_theirs(theirs.PolynomialDecay(**options), initial_weights(False), steps_per_execution=5)
    model = our_model(False, "plain", steps_per_execution=5)
    mine = train_ours(ours.PolynomialDecay(**options), model)
    schedule = ours.PolynomialDecay(**options)
    due = (2, 10, 14, 14)  # at batches 5, 10, 15 and 20
    counts = [round(48 * (1 - schedule(step))) for step in due]
    assert [int(masks[0].sum()) for masks in other.masks] == counts
    assert [int(masks[0].sum()) for masks in mine.masks] == counts


def test_which_variables():
    """Difference 11."""
    weights = prune_registry.PruneRegistry._LAYERS_WEIGHTS_MAP
    assert weights[tf_keras.layers.SeparableConv2D] == ["pointwise_kernel"]
    assert weights[tf_keras.layers.Embedding] == ["embeddings"]
    assert weights[tf_keras.layers.DepthwiseConv2D] == []
    parts = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8,)),
            parts.Embedding(9, 4, name="embedding"),
            parts.Reshape((4, 2, 4)),
            parts.SeparableConv2D(4, 2, name="separable"),
            parts.DepthwiseConv2D(1, name="depthwise"),
            parts.Reshape((3, 4)),
            parts.LSTM(5, name="lstm"),
            parts.Dense(3, name="dense"),
        ]
    )
    pruning = ks.callbacks.GradualPruning(ours.OneShot(0.5))
    pruning.start(model)
    recurrent = ["lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel"]
    assert list(pruning.history[0]["layers"]) == ["embedding", "separable/pointwise_kernel", *recurrent, "dense"]
    cells = prune_registry.PruneRegistry._RNN_CELLS_WEIGHTS_MAP
    assert cells[tf_keras.layers.LSTMCell] == ["kernel", "recurrent_kernel"]
    cell = model.get_layer("lstm").cell
    assert np.count_nonzero(keras.ops.convert_to_numpy(cell.recurrent_kernel)) == 50
