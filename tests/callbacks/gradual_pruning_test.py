"""GradualPruning: the schedule is followed to the step and the unit, and whatever `fit` does, it stays so."""

import csv
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from interruption import Interrupt, state

import keras_sparse as ks
from keras_sparse.callbacks import GradualPruning
from keras_sparse.schedules import ConstantSparsity, Doubling, OneShot, PolynomialDecay

# The axes that one unit spans, of a convolution's kernel and of a dense one.
UNIT_AXES = {
    "weight": {4: (), 2: ()},
    "connection": {4: (0, 1), 2: ()},
    "group": {4: (3,), 2: (1,)},
    "feature_map": {4: (0, 1, 2), 2: (0,)},
    "channel": {4: (0, 1, 3), 2: (1,)},
}
NORMS = {
    "magnitude": np.sum,
    "l2": lambda array, **axes: np.sqrt(np.sum(array.astype("float64") ** 2, **axes)),
    "mean": np.mean,
    "max": np.max,
}


# What must come out, written down once more without the package.


def unit_scores(kernel, granularity, criterion):
    axes = UNIT_AXES[granularity][kernel.ndim]
    return NORMS[criterion](np.abs(kernel), axis=axes, keepdims=True) if axes else np.abs(kernel)


def uniform_masks(sparsity, scores, masks, sizes, result):
    """The highest of what was left in every layer, in the number closest to the target, half to even."""
    expected = {}
    for name, mask in masks.items():
        keep = max(1, min(range(mask.size + 1), key=lambda n: (abs(n - mask.size * (1 - sparsity)), n % 2)))
        alive = sorted(np.flatnonzero(mask), key=lambda i: (-scores[name].flat[i], i))
        expected[name] = np.zeros_like(mask)
        expected[name].flat[alive[:keep]] = 1
    return expected


def global_masks(sparsity, scores, masks, sizes, result):
    """The highest of what was left anywhere, each layer's best before all, in a number that meets the target."""
    alive = [(-scores[n].flat[i], rank, i, n) for rank, n in enumerate(masks) for i in np.flatnonzero(masks[n])]
    best = [min(unit for unit in alive if unit[3] == name) for name in masks]
    order = best + sorted(unit for unit in alive if unit not in best)
    count = sum(int(mask.sum()) for mask in result.values())
    expected = {name: np.zeros_like(mask) for name, mask in masks.items()}
    for _, _, index, name in order[:count]:
        expected[name].flat[index] = 1
    target = (1 - sparsity) * sum(mask.size * sizes[name] for name, mask in masks.items())
    off = sum(sizes[name] for *_, name in order[:count]) - target
    assert abs(off) <= max(sizes.values()) / 2 or count == len(best)  # to one unit; one stays in every layer
    return expected


ALLOCATIONS = {"uniform": uniform_masks, "global": global_masks}


def masks_of(pruning):
    return {weight.name: weight.mask() for weight in pruning._weights}


def kernel_of(layer):
    return keras.ops.convert_to_numpy(layer.kernel)


def kernels_of(model):
    return {layer.name: kernel_of(layer) for layer in model.layers if hasattr(layer, "kernel")}


def shake(model, generator):
    """Move all weights, as a training step would, those under a mask too."""
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            layer._kernel.assign(generator.normal(size=layer._kernel.shape))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def assert_nested(smaller, larger):
    for name in smaller:
        assert (smaller[name] <= larger[name]).all(), name


def kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


# The schedule is followed, step by step.


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("criterion", NORMS)
def test_masks_are_the_papers_at_every_update(cnn, criterion, allocation):
    """All granularities: the highest scores of what was left stay, in the numbers of the schedule and no other."""
    schedule = PolynomialDecay(0.1, 0.9, 2, 12, frequency=3)
    for granularity in UNIT_AXES:
        generator = np.random.default_rng(1)
        model = cnn("sparse", granularity)
        pruning = GradualPruning(schedule, criterion=criterion, allocation=allocation)
        assert pruning.start(model) == 0.0
        masks = masks_of(pruning)
        sizes = {weight.name: weight.unit_size for weight in pruning._weights}
        for step in range(1, 15):
            shake(model, generator)
            kernels = kernels_of(model)
            pruning.update(step)
            if step in (2, 5, 8, 11, 12):
                scores = {name: unit_scores(kernel, granularity, criterion) for name, kernel in kernels.items()}
                masks = ALLOCATIONS[allocation](schedule(step), scores, masks, sizes, masks_of(pruning))
            assert_same(masks_of(pruning), masks)
        assert [entry["step"] for entry in pruning.history] == [2, 5, 8, 11, 12]
        total = sum(masks[name].size * sizes[name] for name in masks)
        pruned = sum((masks[name].size - kept(masks)[name]) * sizes[name] for name in masks)
        assert pruning.history[-1]["sparsity"] == pytest.approx(pruned / total)
        pruning.finish()
        assert_same({layer.name: np.asarray(layer.mask) for layer in model.layers if hasattr(layer, "mask")}, masks)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("granularity", UNIT_AXES)
def test_random_masks_are_nested_and_independent_of_the_path(cnn, granularity, allocation):
    schedule = PolynomialDecay(0.0, 0.8, 0, 8, frequency=2)
    model, generator = cnn("sparse", granularity), np.random.default_rng(2)
    pruning = GradualPruning(schedule, criterion=ks.criteria.Random(5), allocation=allocation)
    pruning.start(model)
    before = masks_of(pruning)
    for step in range(1, 9):
        shake(model, generator)
        pruning.update(step)
        assert_nested(masks_of(pruning), before)
        before = masks_of(pruning)
    at_once = GradualPruning(OneShot(0.8), criterion=ks.criteria.Random(5), allocation=allocation)
    at_once.start(cnn("sparse", granularity))
    if allocation == "uniform" or granularity == "weight":  # units of one size
        assert_same(before, masks_of(at_once))
    other = GradualPruning(OneShot(0.8), criterion=ks.criteria.Random(6), allocation=allocation)
    other.start(cnn("sparse", granularity))
    assert any((before[name] != mask).any() for name, mask in masks_of(other).items())


def test_a_global_share_is_one_of_what_is_left(mlp):
    """However high a criterion rates what another one pruned."""
    model = mlp("sparse")
    GradualPruning(OneShot(0.5), criterion=ks.criteria.Random(1), allocation="global").start(model)
    pruning = GradualPruning(OneShot(0.75, 1), criterion=ks.criteria.Random(2), allocation="global")
    pruning.start(model)
    masks, weight = masks_of(pruning), ks.granularity.get("weight")
    scores = {n: ks.criteria.Random(2).scores(kernel, weight, n) for n, kernel in kernels_of(model).items()}
    pruning.update(1)
    assert_same(masks_of(pruning), global_masks(0.75, scores, masks, {"a": 1, "b": 1}, masks_of(pruning)))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_fit_follows_the_schedule(cnn, fit, recorder, kind, allocation):
    """The update of step t is made from the weights after t optimizer steps, and nothing changes in between."""
    schedule = PolynomialDecay(0.0, 0.85, 3, 17, frequency=4)
    pruning = GradualPruning(schedule, allocation=allocation)
    before, after = recorder(pruning), recorder(pruning)
    model = cnn(kind, "weight")
    fit(model, before, pruning, after)
    masks = {name: np.ones_like(mask) for name, mask in before.masks[0].items()}
    sizes = dict.fromkeys(masks, 1)
    assert before.steps == list(range(1, 21))
    for i, step in enumerate(before.steps):
        assert_same(before.masks[i], masks)
        if step in (3, 7, 11, 15, 17):
            scores = {name: np.abs(kernel) for name, kernel in before.kernels[i].items()}
            masks = ALLOCATIONS[allocation](schedule(step), scores, masks, sizes, after.masks[i])
        assert_same(after.masks[i], masks)
        for name, kernel in after.kernels[i].items():
            assert (kernel[masks[name] == 0] == 0).all() and (kernel[masks[name] == 1] != 0).all()
    units = sum(mask.size for mask in masks.values())
    assert [entry["step"] for entry in pruning.history] == [3, 7, 11, 15, 17]
    assert sum(kept(masks).values()) == pytest.approx(0.15 * units, abs=3 if allocation == "uniform" else 0.5)
    assert_same({n: kernel != 0 for n, kernel in kernels_of(model).items()}, {n: m == 1 for n, m in masks.items()})


def test_criterion_and_granularity_of_a_plain_model(cnn, fit, recorder):
    schedule = PolynomialDecay(0.0, 0.6, 2, 10, frequency=4)
    for granularity, criterion in (("connection", "l2"), ("group", "max"), ("feature_map", "mean")):
        pruning = GradualPruning(schedule, granularity, criterion)
        before, after = recorder(pruning), recorder(pruning)
        model = cnn()
        fit(model, before, pruning, after, epochs=1)
        masks = before.masks[0]
        for i, step in enumerate(before.steps):
            if step in (2, 6, 10):
                scores = {n: unit_scores(k, granularity, criterion) for n, k in before.kernels[i].items()}
                masks = uniform_masks(schedule(step), scores, masks, None, None)
            assert_same(after.masks[i], masks)
        for name, kernel in kernels_of(model).items():
            np.testing.assert_array_equal(kernel != 0, np.broadcast_to(masks[name] == 1, kernel.shape))


def test_a_criterion_of_ones_own(mlp, fit):
    class Last(ks.criteria.Criterion):
        def scores(self, kernel, granularity, name=""):
            assert name in ("a", "b")
            return np.arange(kernel.size).reshape(kernel.shape)

    model = mlp()
    fit(model, GradualPruning(OneShot(0.75), criterion=Last()), epochs=1)
    flat = kernel_of(model.get_layer("a")).ravel()
    assert (flat[:36] == 0).all() and (flat[36:] != 0).all()

    class Wrong(ks.criteria.Criterion):
        def scores(self, kernel, granularity, name=""):
            return np.ones(3)

    with pytest.raises(ValueError, match=r"`criterion` must return scores of the mask's shape, \(6, 8\), for 'a'"):
        fit(mlp(), GradualPruning(OneShot(0.75), criterion=Wrong()), epochs=1)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_targets_of_single_layers(cnn, allocation):
    """A layer's own curve is the schedule's, stretched; the others share the target as if they were alone."""
    schedule = PolynomialDecay(0.2, 0.8, 0, 8, frequency=2)
    model, alone = cnn("sparse", "weight"), cnn("sparse", "weight")
    pruning = GradualPruning(schedule, allocation=allocation, targets={"conv": 0.5, "he.d": 0.9, ".*d": 0.1})
    reference = GradualPruning(schedule, allocation=allocation, include="point")
    generators = [np.random.default_rng(4), np.random.default_rng(4)]
    pruning.start(model)
    reference.start(alone)
    for step in range(1, 11):
        shake(model, generators[0])
        shake(alone, generators[1])
        pruning.update(step)
        reference.update(step)
        rest = (1 - min(step - step % 2, 8) / 8) ** 3
        assert kept(masks_of(pruning))["conv"] == round(72 * (0.5 + 0.3 * rest))  # 1 - (0.5 - 0.3 rest)
        assert kept(masks_of(pruning))["head"] == round(18 * (0.1 + 0.7 * rest))
        assert_same({"point": masks_of(pruning)["point"]}, masks_of(reference))


def test_layer_after_layer(cnn, fit, recorder, kind):
    """Each layer runs through the whole curve in its third of the interval; the others wait, or stay as they are."""
    schedule = PolynomialDecay(0.0, 0.75, 2, 14, frequency=2)
    pruning = GradualPruning(schedule, allocation="layerwise_constant", targets={"head": 0.5})
    model, record = cnn(kind, "weight"), recorder(pruning)
    fit(model, pruning, record)
    for step, masks in zip(record.steps, record.masks):
        for index, (name, size) in enumerate((("conv", 72), ("point", 24))):
            progress = min(max(min(step - step % 2, 14) - (2 + 6 * index), 0) / 6, 1)
            assert masks[name].sum() == round(size * (0.25 + 0.75 * (1 - progress) ** 3)), (step, name)
    assert [kept(masks)["head"] for masks in (record.masks[0], record.masks[-1])] == [18, 9]
    pruning = GradualPruning(ConstantSparsity(0.5, 2, 8, frequency=2), allocation="layerwise_constant")
    pruning.start(model := cnn(kind, "weight"))
    counts = [[pruning.update(step), kept(masks_of(pruning))][1] for step in range(2, 10)]
    assert [tuple(count.values()) for count in counts] == [(36, 24, 18)] * 2 + [(36, 12, 18)] * 2 + [(36, 12, 9)] * 4
    pruning = GradualPruning(ConstantSparsity(0.5, 2, 30, frequency=2), allocation="layerwise_constant")
    with pytest.raises(ValueError, match="`schedule` must reach its last update within the steps of `fit`"):
        fit(model, pruning)
    for schedule in (OneShot(0.5), ConstantSparsity(0.5, 0)):
        with pytest.raises(ValueError, match="`schedule` must have an `end_step` after its `begin_step`"):
            GradualPruning(schedule, allocation="layerwise_constant")


@pytest.mark.parametrize("allocation", ks.callbacks.gradual_pruning.allocations.names())
def test_masks_stand_once_the_final_sparsity_is_reached(cnn, fit, recorder, allocation):
    """Whatever becomes of the weights, and also where the schedule has updates left."""
    schedules = [PolynomialDecay(0.0, 0.75, 2, 8, frequency=3)]
    if allocation != "layerwise_constant":
        schedules.append(ConstantSparsity(0.75, 2, frequency=2))
    for schedule in schedules:
        model, generator = cnn("sparse", "weight"), np.random.default_rng(0)
        pruning = GradualPruning(schedule, allocation=allocation)
        pruning.start(model)
        for step in range(1, 9):
            pruning.update(step)
        masks = masks_of(pruning)
        assert 1 - sum(kept(masks).values()) / 114 == pytest.approx(0.75, abs=0.02)
        for step in range(9, 15):
            shake(model, generator)
            pruning.update(step)
            assert_same(masks_of(pruning), masks)


def test_targets_for_all_layers_and_beyond_the_curve(mlp, fit):
    model, pruning = mlp(), GradualPruning(OneShot(0.3), allocation="global", targets={"a": 0.25, "b": 0.75})
    fit(model, pruning, epochs=1)
    assert kept({name: kernel != 0 for name, kernel in kernels_of(model).items()}) == {"a": 36, "b": 6}
    # A target on the other side of the start: no curve leads there, the layer goes to it at once and stays.
    pruning = GradualPruning(PolynomialDecay(0.5, 0.9, 2, 10, frequency=2), targets={"a": 0.25, "b": 0.5})
    fit(mlp(), pruning, epochs=1)
    assert [entry["layers"] for entry in pruning.history] == [{"a": 0.25, "b": 0.5}] * 5
    densify = GradualPruning(PolynomialDecay(0.5, 0.25, 2, 10, frequency=2), targets={"a": 0.75})
    fit(mlp(), densify, epochs=1)
    assert [entry["layers"]["a"] for entry in densify.history] == [0.75] * 5
    assert densify.history[-1]["layers"]["b"] == 0.25


# Schedules other than the cubic one.


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_doubling(mlp, fit, recorder, kind, criterion):
    schedule = Doubling(0.125, 0.75, begin_step=2, frequency=4)
    pruning = GradualPruning(schedule, criterion=criterion)
    before, after = recorder(pruning), recorder(pruning)
    model = mlp(kind)
    fit(model, before, pruning, after, optimizer=keras.optimizers.Adam(0.01, weight_decay=0.1))
    counts = {1: (48, 24), 2: (6, 3), 5: (6, 3), 6: (12, 6), 9: (12, 6), 10: (24, 12), 14: (36, 18), 20: (36, 18)}
    for step, count in counts.items():
        assert tuple(kept(after.masks[step - 1]).values()) == count, step
    for i, step in enumerate(after.steps):
        if step > 2:
            assert_nested(before.masks[i], after.masks[i])
        for name, kernel in after.kernels[i].items():
            grown = (after.masks[i][name] == 1) & (before.masks[i][name] == 0)
            assert grown.any() == (step in (6, 10, 14)), step
            assert (kernel[grown] == 0).all()
            assert (kernel[after.masks[i][name] == 0] == 0).all()
    for name, kernel in kernels_of(model).items():  # what came back has learned since
        np.testing.assert_array_equal(kernel != 0, after.masks[-1][name] == 1)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_doubling_over_the_network(mlp, criterion):
    """A global share grows too: what is kept stays kept in every layer."""
    model, generator = mlp("sparse"), np.random.default_rng(0)
    pruning = GradualPruning(Doubling(0.125, 1.0, frequency=2), criterion=criterion, allocation="global")
    pruning.start(model)
    masks = masks_of(pruning)
    for step, count in ((1, 9), (2, 18), (4, 36), (6, 72)):
        shake(model, generator)
        pruning.update(step)
        assert_nested(masks, masks_of(pruning))
        masks = masks_of(pruning)
        assert sum(kept(masks).values()) == count


@pytest.mark.parametrize(
    ("schedule", "first", "allocation"),
    [
        (OneShot(0.75, 5), 5, "uniform"),
        (ConstantSparsity(0.75, 5, frequency=2), 5, "global"),
        (ConstantSparsity(0.75, 0, 9, frequency=3), 0, "uniform"),
    ],
    ids=repr,
)
def test_constant_targets_choose_once(mlp, fit, recorder, kind, schedule, first, allocation):
    pruning = GradualPruning(schedule, allocation=allocation)
    after = recorder(pruning)
    fit(mlp(kind), pruning, after)
    for step, masks in zip(after.steps, after.masks):
        assert sum(kept(masks).values()) == (72 if step < first else 18)
        if step >= first:
            assert_same(masks, after.masks[max(first - 1, 0)])


def test_already_sparser_stays_so(mlp, fit, recorder, kind):
    model = mlp(kind)
    fit(model, GradualPruning(OneShot(0.75), include="a"), epochs=1)
    old = kernel_of(model.get_layer("a")) != 0
    pruning = GradualPruning(PolynomialDecay(0.25, 0.5, 14, 19, frequency=2), include=["a", "b"])
    after = recorder(pruning)
    fit(model, pruning, after)
    assert [logs["sparsity"] for logs in after.logs[:3]] == [0.5] * 3  # 36 of 72, before the first update
    for masks in after.masks:
        np.testing.assert_array_equal(masks["a"], old)
    assert kept(after.masks[-1]) == {"a": 12, "b": 12}
    np.testing.assert_array_equal(kernel_of(model.get_layer("a")) != 0, old)


# Steps are optimizer steps.


@pytest.mark.parametrize(
    ("steps_per_execution", "seen"),
    [(1, [0, 3, 6, 9, 12, 13]), (3, [0, 3, 6, 9, 13]), (4, [0, 3, 6, 9, 13]), (64, [0, 9, 13])],
)
def test_steps_per_execution(mlp, fit, recorder, kind, steps_per_execution, seen):
    """Callbacks see every k-th step only; what fell due since is made up for."""
    schedule = PolynomialDecay(0.0, 0.75, 0, 13, frequency=3)
    pruning, model = GradualPruning(schedule), mlp(kind)
    after = recorder(pruning)
    fit(model, pruning, after, steps_per_execution=steps_per_execution)
    assert int(model.optimizer.iterations) == 20
    assert [entry["step"] for entry in pruning.history] == seen
    for entry in pruning.history:
        layers = {name: 1 - round(n * (1 - schedule(entry["step"]))) / n for name, n in (("a", 48), ("b", 24))}
        assert entry["layers"] == pytest.approx(layers)
    for step, masks in zip(after.steps, after.masks):
        assert kept(masks)["a"] == round(48 * (1 - schedule(schedule.update_step(step))))


@pytest.mark.parametrize("steps_per_execution", [1, 5])
def test_gradient_accumulation(mlp, fit, recorder, kind, steps_per_execution):
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=3)
    pruning, model = GradualPruning(PolynomialDecay(0.0, 0.75, 0, 6, frequency=2)), mlp(kind)
    after = recorder(pruning)
    fit(model, pruning, after, optimizer=optimizer, steps_per_execution=steps_per_execution)  # 20 batches, 6 steps
    assert int(model.optimizer.iterations) == 6
    assert [entry["step"] for entry in pruning.history] == [0, 2, 4, 6]
    for step, masks in zip(after.steps, after.masks):
        assert kept(masks)["a"] == round(48 * (1 - pruning.schedule(step - step % 2))), step


def test_batches_left_over_from_an_earlier_fit_count(mlp, fit):
    """Ten batches at four a step leave two; with them, ten more are three steps."""
    model = mlp()
    fit(model, epochs=1, optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))
    pruning = GradualPruning(PolynomialDecay(0.0, 0.75, 2, 5, frequency=1))
    fit(model, pruning, epochs=1)
    assert pruning.history[-1]["step"] == 5 and pruning.history[-1]["sparsity"] == 0.75


def test_initial_epoch(mlp, data):
    model, pruning = mlp(), GradualPruning(PolynomialDecay(0.0, 0.75, 2, 10, frequency=4))
    model.compile("adam", "mse")
    x, y = data(model)
    with pytest.raises(ValueError, match="but 1 epochs of 5 batches from step 0 on end at step 5"):
        model.fit(x, y, batch_size=8, initial_epoch=7, epochs=8, callbacks=[pruning], verbose=0)
    model.fit(x, y, batch_size=8, initial_epoch=6, epochs=8, callbacks=[pruning], verbose=0)
    assert [entry["step"] for entry in pruning.history] == [2, 6, 10]


def test_steps_of_a_model_trained_before(mlp, fit):
    """The optimizer counts on: a schedule whose end is past is fulfilled at once, one within is joined."""
    model, late = mlp(), GradualPruning(PolynomialDecay(0.0, 0.75, 0, 10, frequency=5))
    fit(model, epochs=1)
    fit(model, late, epochs=1)
    assert [(entry["step"], entry["sparsity"]) for entry in late.history] == [(10, 0.75)]
    model, joined = mlp(), GradualPruning(PolynomialDecay(0.0, 0.75, 4, 19, frequency=5))
    fit(model, epochs=1)
    fit(model, joined, epochs=1)
    assert [entry["step"] for entry in joined.history] == [9, 14, 19]


# `fit` too short.


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 3}], ids=["", "steps_per_execution"])
def test_raises_before_the_first_batch(mlp, fit, kind, options):
    model = mlp(kind)
    model.compile("adam", "mse", **options)
    constraint = model.get_layer("a")._kernel.constraint
    weights = model.get_weights()
    message = (
        "`schedule` must reach its last update within the steps of `fit`. Its last update is at optimizer step 21, but "
        "2 epochs of 10 batches from step 0 on end at step 20."
    )
    late = GradualPruning(PolynomialDecay(0.5, 0.9, 0, 21, frequency=4))
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(model, late)
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)
    assert int(model.optimizer.iterations) == 0 and late.history == []
    assert model.get_layer("a")._kernel.constraint == constraint
    just = GradualPruning(PolynomialDecay(0.0, 0.75, 0, 20, frequency=4))
    fit(model, just)
    assert just.history[-1] == {"step": 20, "sparsity": 0.75, "layers": {"a": 0.75, "b": 0.75}}
    assert np.count_nonzero(kernel_of(model.get_layer("a"))) == 12


def test_reach_is_that_of_the_last_change(mlp, fit):
    """A constant sparsity is reached at its beginning, whatever its end; a doubling after its last doubling."""
    fit(mlp(), GradualPruning(ConstantSparsity(0.5, 10, 1000)), epochs=1)
    with pytest.raises(ValueError, match="last update is at optimizer step 11"):
        fit(mlp(), GradualPruning(ConstantSparsity(0.5, 11)), epochs=1)
    with pytest.raises(ValueError, match="last update is at optimizer step 30"):
        fit(mlp(), GradualPruning(Doubling(0.1, 0.8, frequency=10)))
    fit(mlp(), GradualPruning(Doubling(0.2, 0.8, frequency=10)))
    with pytest.raises(ValueError, match="last update is at optimizer step 7"):
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
        fit(mlp(), GradualPruning(OneShot(0.5, 7)), optimizer=optimizer)


def test_generator_of_unknown_length(mlp, data):
    """Nothing can be said beforehand; a schedule that was not fulfilled is told of in the end."""
    for end, warns in ((10, False), (12, True)):
        model, pruning = mlp(), GradualPruning(PolynomialDecay(0.0, 0.75, 2, end, frequency=4))
        model.compile("adam", "mse")
        x, y = data(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit((batch for batch in zip(np.split(x, 10), np.split(y, 10))), callbacks=[pruning], verbose=0)
        ours = [str(w.message) for w in caught if "schedule's last update" in str(w.message)]
        assert len(ours) == warns
        sparsity = f"{pruning.history[-1]['sparsity']:.4f}"
        # Keras 3.15 counts one step more where the data end by surprise.
        message = (
            r"Training ended at step 1[01], before the schedule's last update at step 12: the model's sparsity is "
        )
        assert all(re.fullmatch(f"{message}{sparsity}, not 0.7500.", text) for text in ours)


def test_early_stopping_warns(mlp, fit, kind):
    model, pruning = mlp(kind), GradualPruning(PolynomialDecay(0.0, 0.75, 2, 50, frequency=4))
    stop = keras.callbacks.EarlyStopping("sparsity", patience=1, mode="min")
    with pytest.warns(UserWarning, match="Training ended at step 20, before the schedule's last update at step 50"):
        fit(model, pruning, stop, epochs=9)
    assert np.mean(kernel_of(model.get_layer("a")) == 0) == pruning.history[-1]["layers"]["a"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(mlp(kind), GradualPruning(OneShot(0.5)), stop, epochs=9)


# More than one `fit`, more than one callback.


@pytest.mark.parametrize("same", [True, False], ids=["same callback", "new callback"])
def test_second_fit_goes_on(mlp, fit, kind, same):
    """Two fits of one epoch are one of two: weights, masks and steps."""
    schedule = PolynomialDecay(0.0, 0.75, 2, 18, frequency=4)
    whole, split = mlp(kind), mlp(kind)
    fit(whole, GradualPruning(schedule), optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    pruning = GradualPruning(schedule)
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(split, "stop_training", True))
    with pytest.warns(UserWarning, match="Training ended at step 10"):
        fit(split, pruning, stop, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    assert np.count_nonzero(kernel_of(split.layers[0])) == round(48 * (1 - schedule(10)))
    pruning = pruning if same else GradualPruning(schedule)
    fit(split, pruning, initial_epoch=1)
    assert_same(kernels_of(whole), kernels_of(split))
    assert [entry["step"] for entry in pruning.history] == ([2, 6, 10] if same else []) + [10, 14, 18]


def test_a_model_fitted_densely_before(mlp, fit, recorder, kind):
    """Its train step was traced without masks: momentum would move what is pruned."""
    model, pruning = mlp(kind), GradualPruning(OneShot(0.75, 13))
    fit(model, epochs=1, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    after = recorder(pruning)
    fit(model, pruning, after, epochs=1)
    for step, kernels in zip(after.steps, after.kernels):
        assert np.count_nonzero(kernels["a"]) == (48 if step < 13 else 12)


def test_dense_again_after_pruning(mlp, fit):
    """A plain model that was pruned is its owner's again: nothing holds its zeros any more."""
    model = mlp()
    fit(model, GradualPruning(OneShot(0.75), include="a"), epochs=1)
    assert model.get_layer("a").kernel.constraint is None
    fit(model, epochs=1)
    assert np.count_nonzero(kernel_of(model.get_layer("a"))) == 48


def test_a_callback_after_another(mlp, fit, kind):
    """Magnitude, then random, then dense again."""
    model = mlp(kind)
    layer = model.get_layer("a")
    fit(model, GradualPruning(OneShot(0.5), include="a"), epochs=1)
    half = kernel_of(layer) != 0
    fit(model, GradualPruning(OneShot(0.75), criterion="random", include="a"), epochs=1)
    quarter = kernel_of(layer) != 0
    assert half.sum() == 24 and quarter.sum() == 12 and (quarter <= half).all()
    fit(model, GradualPruning(Doubling(0.25, 1.0, begin_step=22, frequency=2), include="a"), epochs=1)
    assert np.count_nonzero(kernel_of(layer)) == 48


def test_callbacks_side_by_side(mlp, fit, kind):
    """Each drives its own layers; on the same layer, what either of them prunes is pruned."""
    model = mlp(kind)
    first, second = GradualPruning(OneShot(0.5, 3), include="a"), GradualPruning(OneShot(0.75, 5), include="b")
    fit(model, first, second, epochs=1, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    assert kept({name: kernel != 0 for name, kernel in kernels_of(model).items()}) == {"a": 24, "b": 6}
    model = mlp(kind)
    maps, weights = GradualPruning(OneShot(0.5, 2), "feature_map"), GradualPruning(OneShot(0.25, 4), "weight")
    fit(model, maps, weights, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    a = kernel_of(model.get_layer("a")) != 0
    assert a.any(axis=0).sum() == 4 and a.sum() == 24  # sparser already than the weights' target
    if kind == "plain":
        assert model.get_layer("a").kernel.constraint is None


def test_an_exception_leaves_nothing_behind(mlp, fit, kind):
    """The next callback starts from the weights as they are, not from the mask of the run that broke off."""
    model = mlp(kind)
    constraint = model.get_layer("a")._kernel.constraint
    with pytest.raises(InterruptedError):
        fit(model, GradualPruning(OneShot(0.75), include="a"), Interrupt(step=5), epochs=1)
    assert np.count_nonzero(kernel_of(model.get_layer("a"))) == 12
    fit(model, GradualPruning(Doubling(0.25, 1.0, begin_step=5, frequency=2), include="a"), epochs=1)
    assert np.count_nonzero(kernel_of(model.get_layer("a"))) == 48
    assert model.get_layer("a")._kernel.constraint == constraint


# What `fit` reports.


def test_logs(mlp, fit, kind, tmp_path, capsys, monkeypatch):
    schedule = PolynomialDecay(0.0, 0.75, 0, 20, frequency=5)
    if not importlib.util.find_spec("tensorboard"):  # tf.summary.scalar asks for it to make these very bytes
        module = importlib.import_module("tensorflow.summary")
        monkeypatch.setattr(module, "scalar", lambda name, data, step: module.write(name, float(data), step))
    pruning, model = GradualPruning(schedule), mlp(kind)
    board = keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False, update_freq=1)
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(model, pruning, board, log, verbose=1).history
    epochs = [1 - round(72 * (1 - schedule(10))) / 72, 0.75]
    assert history["sparsity"] == pytest.approx(epochs, abs=1 / 48)
    assert history["sparsity"] == [entry["sparsity"] for entry in pruning.history[2::2]]
    with open(tmp_path / "log.csv") as file:
        assert [float(row["sparsity"]) for row in csv.DictReader(file)] == history["sparsity"]
    shown = [float(value) for value in re.findall(r"sparsity: ([0-9.e+-]+)", capsys.readouterr().out)]
    assert shown[-1] == 0.75 and round(history["sparsity"][0], 4) in shown
    events = {"epoch_sparsity": [], "batch_sparsity": []}
    for path in sorted((tmp_path / "board").rglob("*.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value:
                if value.tag in events:
                    events[value.tag].append(float(tf.make_ndarray(value.tensor)))
    assert events["epoch_sparsity"] == pytest.approx(history["sparsity"])
    assert len(events["batch_sparsity"]) == 20 and events["batch_sparsity"] == sorted(events["batch_sparsity"])


def test_logs_change_nothing_else(mlp, fit):
    """Loss and metrics of `History` are those of a run without the callback."""
    plain, pruned = mlp(), mlp()
    without = fit(plain, metrics=["mae"]).history
    with_callback = fit(pruned, GradualPruning(ConstantSparsity(0.0, 0)), metrics=["mae"]).history
    assert with_callback.pop("sparsity") == [0.0, 0.0]
    assert with_callback == without


def test_sparsity_counts_what_was_pruned_before(cnn, fit):
    """At a granularity coarser than the layers', the zeros inside the units that stay are counted too."""
    model = cnn("sparse", "weight")
    fit(model, GradualPruning(OneShot(0.5)), epochs=1)
    pruning = GradualPruning(OneShot(0.25), "feature_map", include="conv")
    history = fit(model, pruning, epochs=1).history
    zeros = float(np.mean(kernel_of(model.get_layer("conv")) == 0))
    assert history["sparsity"] == [zeros] == [pruning.history[0]["layers"]["conv"]]
    assert 0.5 < zeros < 0.75


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_evaluate_and_predict_change_nothing(mlp, data, kind, method):
    model, pruning = mlp(kind), GradualPruning(OneShot(0.5))
    model.compile("adam", "mse")
    x, y = data(model)
    constraint, weights = model.get_layer("a")._kernel.constraint, model.get_weights()
    arguments = (x, y) if method == "evaluate" else (x,)
    getattr(model, method)(*arguments, callbacks=[pruning], verbose=0)
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)
    assert model.get_layer("a")._kernel.constraint == constraint and pruning.history == []


def test_validation_in_fit(mlp, data, kind):
    """Validation sees the pruned model, and the callback goes on after it."""
    model = mlp(kind)
    model.compile("adam", "mse")
    x, y = data(model)
    pruning = GradualPruning(PolynomialDecay(0.0, 0.75, 2, 20, frequency=6))
    history = model.fit(x, y, batch_size=4, epochs=2, validation_data=(x, y), callbacks=[pruning], verbose=0).history
    assert [entry["step"] for entry in pruning.history] == [2, 8, 14, 20]
    assert history["val_loss"][-1] == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)


# Resumed runs (invariant 2).

RESUMED = PolynomialDecay(0.0, 0.8, 2, 26, frequency=4)  # 2, 6, 10, ..., 26, with ten steps an epoch


def compiled(model):
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01, use_ema=True, ema_momentum=0.9), "mse")
    return model


UNINTERRUPTED = {}  # the states of runs that were not interrupted, which many tests compare with


@pytest.mark.parametrize(
    ("freq", "interrupt", "criterion", "first"),
    [
        ("epoch", {"step": 14}, "magnitude", True),
        ("epoch", {"epoch": 1}, "random", False),
        (1, {"step": 13}, "magnitude", False),
        (1, {"step": 14}, "magnitude", True),
        (1, {"step": 14}, "random", False),
        pytest.param("epoch", {"step": 14}, "magnitude", False, marks=pytest.mark.slow),
        pytest.param("epoch", {"epoch": 1}, "magnitude", True, marks=pytest.mark.slow),
        pytest.param(1, {"step": 13}, "random", True, marks=pytest.mark.slow),
        pytest.param(1, {"step": 14}, "magnitude", False, marks=pytest.mark.slow),
        pytest.param(3, {"step": 23}, "magnitude", True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resumed_runs_end_as_uninterrupted_ones(mlp, data, kind, freq, interrupt, criterion, first, tmp_path):
    """Bit for bit, in a new model; BackupAndRestore stands before the pruning or after it.

    Keras resumes at the beginning of the epoch, whatever batch it had saved at: the run to compare with is one `fit`
    over just the batches that the saved state and the resumed run have seen.
    """
    x, y = data(mlp())
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}

    def attempt(*interrupts):
        pruning = GradualPruning(RESUMED, criterion=criterion)
        backup = keras.callbacks.BackupAndRestore(tmp_path, save_freq=freq)
        callbacks = [backup, pruning] if first else [pruning, backup]
        model = compiled(mlp(kind))
        model.fit(x, y, epochs=3, callbacks=callbacks + list(interrupts), **options)
        return model, pruning

    with pytest.raises(InterruptedError):
        attempt(Interrupt(**interrupt))
    saved = json.loads((tmp_path / "training_metadata.json").read_text())
    resumed, pruning = attempt()
    assert pruning.history[-1]["step"] == 26 and pruning.history[0]["step"] >= 10  # it did resume
    for name, kernel in kernels_of(resumed).items():
        assert np.count_nonzero(kernel) == round(0.2 * kernel.size), name

    left = 10 * (3 - saved["epoch"])
    batches = [*range(int(resumed.optimizer.iterations) - left), *range(left)]
    if (kind, criterion, *batches) not in UNINTERRUPTED:
        model = compiled(mlp(kind))
        order = np.concatenate([np.arange(4) + 4 * (i % 10) for i in batches])
        model.fit(x[order], y[order], callbacks=[GradualPruning(RESUMED, criterion=criterion)], **options)
        UNINTERRUPTED[(kind, criterion, *batches)] = state(model)
    for ours, whole in zip(state(resumed), UNINTERRUPTED[(kind, criterion, *batches)], strict=True):
        np.testing.assert_array_equal(ours, whole)


@pytest.mark.parametrize("granularity", ["weight", "connection"])
def test_asked_again_nothing_changes(cnn, granularity):
    """A resumed run asks again for what is in place; by then the weights have moved."""
    for allocation in ALLOCATIONS:
        for sparsity in (0.15, 0.25, 0.5, 0.75, 0.9):
            generator, model = np.random.default_rng(1), cnn("sparse", granularity)
            pruning = GradualPruning(OneShot(sparsity, 2), criterion="mean", allocation=allocation)
            pruning.start(model)
            shake(model, generator)
            pruning.update(2)
            masks = masks_of(pruning)
            shake(model, generator)
            pruning.start(model, step=3)
            assert_same(masks_of(pruning), masks)


IN_A_NEW_PROCESS = """
import os, sys
import keras, numpy as np
import keras_sparse as ks

class Die(keras.callbacks.Callback):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 13:
            self.how(13)

def run(dense, directory, *callbacks):
    keras.backend.clear_session()
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), dense(8, "tanh"), dense(3)])
    model.compile(keras.optimizers.Adam(0.01, weight_decay=0.02), "mse")
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(40, 6)), generator.normal(size=(40, 3))
    pruning = ks.callbacks.GradualPruning(ks.schedules.PolynomialDecay(0, 0.8, 2, 26, frequency=4), criterion="random")
    backup = keras.callbacks.BackupAndRestore(os.path.join(directory, dense.__name__))
    model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0, callbacks=[backup, pruning, *callbacks])
    variables = model.variables + model.optimizer.variables
    return [keras.ops.convert_to_numpy(v) for v in variables], pruning.history[0]["step"]

action, directory = sys.argv[1:]
if action == "die":
    try:
        run(ks.layers.SparseDense, directory, Die(sys.exit))
    except SystemExit:
        run(keras.layers.Dense, directory, Die(os._exit))
for dense in (ks.layers.SparseDense, keras.layers.Dense):
    resumed, begun = run(dense, directory)
    whole, _ = run(dense, directory + "/whole")
    assert begun == 10, begun
    assert all((a == b).all() for a, b in zip(resumed, whole, strict=True))
print("equal")
"""


def in_a_process(script, *arguments):
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_resumed_in_a_new_process(tmp_path):
    """Layers have the names that Keras gives them; the process ends without a word, mid-epoch."""
    died = in_a_process(IN_A_NEW_PROCESS, "die", str(tmp_path))
    assert died.returncode == 13, died.stderr
    resumed = in_a_process(IN_A_NEW_PROCESS, "resume", str(tmp_path))
    assert resumed.stdout.strip() == "equal", resumed.stderr


# Models and loops of one's own.


class OwnTrainStep(keras.Model):
    """Subclassed, nested, with a train step of its own, and layers kept in a list."""

    def __init__(self, kind):
        super().__init__()
        dense = keras.layers.Dense if kind == "plain" else ks.layers.SparseDense
        self.body = [dense(8, "tanh", name="a"), dense(4, "tanh", name="b")]
        self.head = keras.Sequential([dense(3, name="c")], name="head")

    def call(self, x):
        for layer in self.body:
            x = layer(x)
        return self.head(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"own": loss}


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_subclassed_model_with_its_own_train_step(kind, run_eagerly):
    keras.utils.set_random_seed(0)
    model, generator = OwnTrainStep(kind), np.random.default_rng(0)
    x, y = generator.normal(size=(40, 6)), generator.normal(size=(40, 3))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), run_eagerly=run_eagerly)
    model(x[:1])  # builds it
    pruning = GradualPruning(PolynomialDecay(0.0, 0.75, 2, 10, frequency=4), exclude="head/c")
    history = model.fit(x, y, batch_size=4, callbacks=[pruning], epochs=2, verbose=0).history
    assert sorted(history) == ["own", "sparsity"] and history["sparsity"] == [0.75, 0.75]
    assert list(pruning.history[-1]["layers"]) == ["a", "b"]
    assert [np.count_nonzero(kernel_of(layer)) for layer in (*model.body, model.head.layers[0])] == [12, 8, 12]


@pytest.mark.parametrize("graph", [True, False], ids=["tf.function", "eager"])
def test_loop_of_ones_own(mlp, data, kind, graph):
    """`start`, `update`, `finish`: pruned weights are zero after every step, momentum or not."""
    schedule = PolynomialDecay(0.0, 0.75, 3, 11, frequency=4)
    model, pruning = mlp(kind), GradualPruning(schedule)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    x, y = data(model)
    constraint = model.get_layer("a")._kernel.constraint
    with pytest.raises(RuntimeError, match=r"Call `start\(model\)` before `update\(step\)`"):
        pruning.update(0)
    assert pruning.start(model) == 0.0

    def train_step(inputs, targets):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((model(inputs, training=True) - targets) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    train_step = tf.function(train_step) if graph else train_step
    for step in range(1, 16):
        train_step(x[:8], y[:8])
        before = masks_of(pruning)
        for name, kernel in kernels_of(model).items():
            np.testing.assert_array_equal(kernel != 0, before[name] == 1)
        sparsity = pruning.update(step)
        wanted = 0.0 if step < 3 else schedule(min(step - (step - 3) % 4, 11))
        count = {"a": round(48 * (1 - wanted)), "b": round(24 * (1 - wanted))}
        assert kept(masks_of(pruning)) == count and sparsity == pytest.approx(1 - sum(count.values()) / 72)
    pruning.finish()
    pruning.finish()  # once more does no harm
    assert model.get_layer("a")._kernel.constraint == constraint
    assert np.count_nonzero(kernel_of(model.get_layer("a"))) == 12
    with pytest.raises(RuntimeError, match="Call `start"):
        pruning.update(16)


def test_loop_of_ones_own_with_averages(mlp, kind):
    """`finish` comes after the averages have taken the weights' place, and makes them sparse."""
    model, pruning = mlp(kind), GradualPruning(OneShot(0.75, 2))
    optimizer, generator = keras.optimizers.SGD(0.1, use_ema=True), np.random.default_rng(0)
    pruning.start(model)
    for step in range(1, 5):
        gradients = [generator.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
        pruning.update(step)
    optimizer.finalize_variable_values(model.trainable_variables)
    masks = masks_of(pruning)
    assert np.count_nonzero(keras.ops.convert_to_numpy(model.get_layer("a")._kernel)) == 48
    pruning.finish()
    for layer in model.layers:
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer._kernel) != 0, masks[layer.name] == 1)


def test_loop_of_ones_own_resumed(mlp, kind):
    model, pruning = mlp(kind), GradualPruning(PolynomialDecay(0.0, 0.75, 3, 11, frequency=4))
    assert pruning.start(model, step=9) == pytest.approx(0.75 * (1 - 1 / 8), abs=1 / 48)
    assert [entry["step"] for entry in pruning.history] == [7]
    pruning.start(model, step=11)  # without `finish`, on the same model
    assert pruning.history[-1] == {"step": 11, "sparsity": 0.75, "layers": {"a": 0.75, "b": 0.75}}
    pruning.start(mlp(kind))  # and on another: the first one is its owner's again
    if kind == "plain":
        assert model.get_layer("a").kernel.constraint is None


# What cannot be pruned.


def test_nan_is_an_error(mlp, fit, kind):
    class Diverge(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 4:
                variable = self.model.get_layer("b")._kernel
                variable.assign(variable * float("nan"))

    message = "without NaN for 'b': the kernel or a gradient holds NaN, training has diverged"
    with pytest.raises(ValueError, match=message):
        fit(mlp(kind), Diverge(), GradualPruning(OneShot(0.5, 5)), epochs=1)


def test_a_model_must_be_built_and_compiled(mlp):
    unbuilt = keras.Sequential([keras.layers.Dense(3)], name="raw")
    unbuilt.compile("adam", "mse")
    message = r"`model` must be built before it is pruned: give it an `Input` layer .*model='raw'"
    with pytest.raises(ValueError, match=message):
        GradualPruning(OneShot(0.5)).start(unbuilt)
    with pytest.raises(ValueError, match=message):  # Keras would build it within the first batch
        unbuilt.fit(np.zeros((4, 6)), np.zeros((4, 3)), callbacks=[GradualPruning(OneShot(0.5))], verbose=0)
    pruning = GradualPruning(OneShot(0.5))
    pruning.set_model(mlp())
    with pytest.raises(RuntimeError, match="has no optimizer to count steps by: compile it"):
        pruning.on_train_begin()
    with pytest.raises(ValueError, match="compile"):
        mlp().fit(np.zeros((4, 6)), np.zeros((4, 3)), callbacks=[pruning], verbose=0)


# Precision and distribution.


@pytest.fixture
def mixed_float16():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(policy)


def test_mixed_float16(mixed_float16, cnn, fit, recorder, kind):
    """Steps are those of the optimizer inside the loss-scale optimizer, its averages too."""
    optimizer = keras.optimizers.Adam(0.01, weight_decay=0.1, use_ema=True)
    pruning, model = GradualPruning(PolynomialDecay(0.0, 0.75, 2, 18, frequency=4), "weight"), cnn(kind, "weight")
    after = recorder(pruning)
    fit(model, pruning, after, optimizer=optimizer)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert [entry["step"] for entry in pruning.history] == [2, 6, 10, 14, 18]
    for kernels, masks in zip(after.kernels, after.masks):
        assert_same({n: k != 0 for n, k in kernels.items()}, {n: m == 1 for n, m in masks.items()})
    counts = kept({name: kernel != 0 for name, kernel in kernels_of(model).items()})
    assert counts == {"conv": 18, "point": 6, "head": 4}
    inner = model.optimizer.inner_optimizer
    for variable, average in zip(inner._trainable_variables, inner._model_variables_moving_average):
        if kind == "plain" and variable.name == "kernel":
            variable, average = keras.ops.convert_to_numpy(variable), keras.ops.convert_to_numpy(average)
            np.testing.assert_array_equal(average != 0, variable != 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_counts_are_exact_in_half_precision(dtype, kind):
    """A mask of bfloat16 cannot count beyond 256, nor one of float16 beyond 2048, if it counts in itself."""
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense if kind == "plain" else ks.layers.SparseDense
    model = keras.Sequential([keras.Input((50,)), dense(83, dtype=dtype, kernel_initializer="ones", name="a")])
    pruning, generator = GradualPruning(PolynomialDecay(0.0, 0.5, 0, 4, frequency=2)), np.random.default_rng(0)
    pruning.start(model)
    for step, count in ((1, 4150), (2, round(4150 * (1 - 0.4375))), (3, round(4150 * (1 - 0.4375))), (4, 2075)):
        model.layers[0]._kernel.assign(generator.normal(size=(50, 83)))
        sparsity = pruning.update(step)
        assert kept(masks_of(pruning)) == {"a": count} and sparsity == pytest.approx(1 - count / 4150)


MIRRORED = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, numpy as np
import keras_sparse as ks

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
generator = np.random.default_rng(1)
x, y = generator.normal(size=(80, 6)), generator.normal(size=(80, 3))
for dense in (ks.layers.SparseDense, keras.layers.Dense):
    with strategy.scope():
        model = keras.Sequential([keras.Input((6,)), dense(8, "tanh", name="a"), dense(3, name="b")])
        model.compile(keras.optimizers.Adam(0.01, weight_decay=0.1, use_ema=True), "mse")

    class Check(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for weight in pruning._weights:
                variable = weight.layer._kernel.value
                for replica in (*strategy.experimental_local_results(variable),):
                    assert ((np.asarray(replica) != 0) == (weight.mask() == 1)).all(), (dense, batch, weight.name)
            assert len(strategy.experimental_local_results(variable)) == 2

    pruning = ks.callbacks.GradualPruning(ks.schedules.PolynomialDecay(0, 0.75, 2, 18, frequency=4))
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[pruning, Check()]).history
    assert [entry["step"] for entry in pruning.history] == [2, 6, 10, 14, 18]
    assert history["sparsity"][-1] == 0.75
    assert [int((np.asarray(layer.kernel) != 0).sum()) for layer in model.layers] == [12, 6]
    print(dense.__name__)
"""


@pytest.mark.slow
def test_mirrored_strategy():
    """Two replicas; every copy of every kernel is sparse after every step."""
    finished = in_a_process(MIRRORED)
    assert finished.stdout.split() == ["SparseDense", "Dense"], finished.stderr


def test_a_schedule_that_lies_behind_the_optimizer_warns(mlp, fit):
    model = mlp("sparse")
    fit(model, epochs=2)
    with pytest.warns(UserWarning, match="last update, at step 10, lies before the optimizer's step 20"):
        fit(model, GradualPruning(ks.schedules.PolynomialDecay(0.0, 0.5, 0, 10, frequency=5)), epochs=1)


def test_a_resumed_run_past_the_schedule_does_not_warn(mlp, fit):
    model = mlp("sparse")
    schedule = ks.schedules.PolynomialDecay(0.0, 0.5, 0, 10, frequency=5)
    fit(model, GradualPruning(schedule), epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, GradualPruning(schedule), epochs=1)


def test_restoring_an_epoch_of_less_sparsity_warns(mlp, fit):
    class RestoreFirstEpoch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.weights = getattr(self, "weights", None) or self.model.get_weights()

        def on_train_end(self, logs=None):
            self.model.set_weights(self.weights)

    pruning = GradualPruning(ks.schedules.PolynomialDecay(0.0, 0.75, 0, 20, frequency=5))
    with pytest.warns(UserWarning, match="weights and masks of an earlier epoch were restored"):
        fit(mlp("sparse"), RestoreFirstEpoch(), pruning, epochs=3)
