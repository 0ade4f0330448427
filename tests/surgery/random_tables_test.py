"""Random connection tables: exact counts, nested, uniform, and never a connection that leads nowhere."""

import itertools
import warnings

import keras
import numpy as np
import pytest
from channel_models import chain, concatenation, conv, groups, lively, many, residual, shared, unknown
from keras import layers

import keras_sparse as ks
from keras_sparse import selection
from keras_sparse.surgery import RandomTables
from keras_sparse.surgery.channels import ChannelGraph, connection_table

SLOW = ("DenseNet121", "InceptionV3", "ResNet50")
DENSITIES = (1e-6, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0)


def grey(filters=16, second=12):
    x = inputs = keras.Input((6, 5, 1))
    x = layers.BatchNormalization()(conv(filters, name="a")(x))
    x = layers.MaxPooling2D()(conv(second, activation="relu", name="b")(x))
    return keras.Model(inputs, layers.Dense(3, use_bias=False, name="d")(layers.Flatten()(conv(9, name="c")(x))))


def hourglass():
    x = inputs = keras.Input((6, 5, 1))
    x = conv(1, name="b")(conv(9, name="a")(x))
    x = layers.Concatenate()([conv(6, name="c")(x), conv(5, name="d")(x)])
    return keras.Model(inputs, conv(1, name="e")(conv(7, 1, name="f")(x)))


MODELS = [chain, residual, concatenation, groups, shared, many, unknown, grey, hourglass]


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ks.random_tables(*arguments, **options)


def sparse_layers(model):
    found = selection.flatten_layers(model).items()
    return {path: layer for path, layer in found if isinstance(layer, ks.layers.BaseSparse)}


def only_reachable_by_paths(model):
    """Set weights so that gradients show what is on a path; see channels_test."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.name != "mask":
            low = 0 if variable.name in ("beta", "moving_mean") else 0.5
            variable.assign(rng.uniform(low, 3 * low, variable.shape))
    for layer in sparse_layers(model).values():
        layer.assign_mask(np.asarray(layer.mask))
    return model


@pytest.mark.parametrize("fan_in", [None, "constant"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_every_connection_is_on_a_path_and_tables_are_nested(build, fan_in):
    model = ks.sparsify(build(), include=layers.Conv2D)
    tables = RandomTables(model, fan_in=fan_in, seed=3)
    graph = ChannelGraph(model)
    everything = graph.alive({path: np.ones(levels.shape) for path, levels in tables.levels.items()})
    grows = build in (grey, hourglass)  # a single channel: some are dead at low densities
    before = {path: np.zeros(layer.mask.shape) for path, layer in sparse_layers(model).items()}
    for density in np.unique(np.concatenate([DENSITIES, np.linspace(0.001, 1, 60)])):
        masks = tables.masks(density)
        assert set(masks) == set(before)
        two = {path: mask.reshape(mask.shape[-2:]) for path, mask in masks.items()}
        assert not any(dangling.any() for dangling in graph.dangling(two).values()), density
        if not grows or density == 1:
            np.testing.assert_array_equal(graph.alive(two), everything)
        assert graph.alive(two)[graph.outputs[0].ids].all()
        for path, mask in masks.items():
            assert mask.dtype == "float32" and mask.shape == before[path].shape
            assert (mask >= before[path]).all(), f"{path} is not nested at {density}"
        before = masks
    assert all(mask.all() for mask in before.values()), "nothing may be missing at density 1"


@pytest.mark.parametrize("build", [chain, residual, concatenation, groups, shared, many, grey, hourglass])
@pytest.mark.parametrize("density", [1e-6, 0.2])
def test_the_models_own_gradients_find_no_dead_connection(build, density):
    model = ks.sparsify(build())
    quietly(model, density, seed=1, include=ks.layers.SparseConv2D)
    model = only_reachable_by_paths(model)
    for path, on_path in lively(model).items():
        kept = connection_table(sparse_layers(model)[path])
        if not isinstance(sparse_layers(model)[path], layers.Dense):
            np.testing.assert_array_equal(on_path, kept, err_msg=path)
            assert kept.any()


@pytest.mark.parametrize("density", [0.05, 0.1, 0.25, 0.333, 0.5, 0.9, 1.0])
def test_counts_are_exact(density):
    x = inputs = keras.Input((5, 5, 13))
    for filters, size in ((31, 3), (17, 1), (23, (1, 3)), (11, 3)):
        x = conv(filters, size)(x)
    model = ks.sparsify(keras.Model(inputs, x))
    true = quietly(model, density)
    kept = [int(np.asarray(layer.mask).sum()) for layer in sparse_layers(model).values()]
    sizes = [np.asarray(layer.mask).size for layer in sparse_layers(model).values()]
    widest = [31, 31, 23, 23]
    assert kept == [max(int(density * size + 0.5), wide) for size, wide in zip(sizes, widest)]
    assert true == sum(kept) / sum(sizes)
    counts = ks.count(model)["layers"]
    assert [entry["connections"] for entry in counts.values()] == kept


@pytest.mark.parametrize("density", [0.04, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_constant_fan_in(density):
    x = inputs = keras.Input((5, 5, 13))
    for filters, size in ((31, 3), (17, 1), (23, (1, 3))):
        x = conv(filters, size)(x)
    model = ks.sparsify(keras.Model(inputs, x))
    quietly(model, density, fan_in="constant")
    # 31 channels are read by 17 outputs: at least two each.
    for layer, inputs, fewest in zip(sparse_layers(model).values(), (13, 31, 17), (1, 2, 1)):
        fan_in = np.asarray(layer.mask).sum(axis=(0, 1, 2))
        assert set(fan_in) == {max(int(density * inputs + 0.5), fewest)}


def brute_force(model, exclude):
    """Return the fewest connections with which all channels have a path, by trying."""
    graph = ChannelGraph(model)
    shapes = {
        path: connection_table(layer).shape for path, layer in sparse_layers(model).items() if path not in exclude
    }
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    places = np.cumsum([0, *sizes])
    for count in range(1, places[-1] + 1):
        for chosen in itertools.combinations(range(places[-1]), count):
            flat = np.zeros(places[-1], bool)
            flat[list(chosen)] = True
            parts = [flat[a:b].reshape(shape) for a, b, shape in zip(places, places[1:], shapes.values())]
            if graph.alive(dict(zip(shapes, parts))).all():
                return count
    raise AssertionError


def small_chain():
    x = inputs = keras.Input((3, 3, 2))
    return keras.Model(inputs, conv(2, name="b")(conv(3, name="a")(x)))


def small_branches():
    x = inputs = keras.Input((3, 3, 2))
    x = conv(3, name="a")(x)
    return keras.Model(inputs, layers.Concatenate()([conv(2, 1, name="b")(x), conv(2, name="c")(x)]))


def small_sum():
    x = inputs = keras.Input((3, 3, 2))
    x = conv(2, name="a")(x)
    x = layers.Add()([x, conv(2, name="b")(layers.ReLU()(x))])
    return keras.Model(inputs, conv(2, name="c")(x))


def small_dense_block():
    x = inputs = keras.Input((3, 3, 2))
    y = conv(2, name="a")(x)
    x = layers.Concatenate()([x, y])
    x = layers.Concatenate()([conv(2, name="b")(x), y])
    return keras.Model(inputs, conv(1, 1, name="c")(x))


@pytest.mark.parametrize(
    ("build", "whole"),
    # A layer of one output channel has its own rule; others stay whole to keep the search short.
    [(small_chain, None), (small_branches, ["a"]), (small_sum, None), (small_dense_block, ["c"])],
)
def test_the_smallest_table_is_the_smallest(build, whole):
    model = ks.sparsify(build())
    expected = brute_force(model, whole or [])
    for seed in range(5):
        tables = RandomTables(model, exclude=whole, seed=seed)
        assert sum(mask.sum() for mask in tables.masks(1e-9).values()) == expected


def test_channels_of_branches_find_the_readers_that_need_them():
    # Eight channels and three readers of 4 outputs each: nothing beyond one connection an output is needed, however
    # the channels that only one of them reads lie.
    x = inputs = keras.Input((4, 4, 8))
    x = conv(8, name="a")(x)
    y = conv(4, name="b")(x)
    z = conv(4, name="c")(layers.Concatenate()([x, y]))
    model = ks.sparsify(keras.Model(inputs, conv(4, name="d")(layers.Concatenate()([y, z]))))
    for seed in range(5):
        masks = RandomTables(model, seed=seed).masks(1e-9)
        assert {path: int(mask.sum()) for path, mask in masks.items()}["a"] == 8
        # 8 of x and 4 of y are read by b (4 places, x), c (4, x and y), d (4, y and z, of which z needs all 4).
        assert sum(int(mask.sum()) for mask in masks.values()) == 8 + 8 + 4 + 4


@pytest.mark.parametrize("fan_in", [None, "constant"])
def test_tables_are_uniform(fan_in):
    x = inputs = keras.Input((3, 3, 6))
    model = ks.sparsify(keras.Model(inputs, conv(7, name="b")(conv(8, name="a")(x))))
    draws, density = 200, 0.5
    total = {}
    for seed in range(draws):
        for path, mask in RandomTables(model, fan_in=fan_in, seed=seed).masks(density).items():
            total[path] = total.get(path, 0) + mask[0, 0]
    for path, times in total.items():
        deviation = np.sqrt(draws * density * (1 - density))
        assert np.abs(times - draws * density).max() < 4.5 * deviation, path
        assert times.std() > deviation / 2, "a table that never changes is not random"


def test_the_draw_depends_on_the_seed_and_the_place_alone():
    one = ks.sparsify(keras.Model(*(lambda i: (i, conv(9)(conv(8)(i))))(keras.Input((3, 3, 6)))))
    two = ks.sparsify(keras.Model(*(lambda i: (i, conv(9)(conv(8)(i))))(keras.Input((3, 3, 6)))))
    assert [v.name for v in one.layers] != [v.name for v in two.layers]
    for seed in (0, 5):
        first, second = (list(RandomTables(model, seed=seed).masks(0.3).values()) for model in (one, two))
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)
    other = list(RandomTables(one, seed=6).masks(0.3).values())
    assert all((a != b).any() for a, b in zip(first, other))
    # The same connections whatever the layer's masks were.
    quietly(one, 0.1, seed=9)
    quietly(one, 0.3, seed=5)
    for layer, b in zip(sparse_layers(one).values(), second):
        np.testing.assert_array_equal(layer.mask, b)


def test_a_single_channel_keeps_the_square_root():
    model = ks.sparsify(grey(32, 24), include=["a", "b", "c"])
    tables = RandomTables(model)
    for density in (0.1, 0.25, 0.5, 0.9):
        masks = tables.masks(density)
        assert masks["a"].sum() == int(np.sqrt(density) * 32 + 0.5)
        dead = masks["a"][0, 0, 0] == 0
        assert not masks["b"][0, 0][dead].any(), "no connection comes out of a dead filter"
        assert masks["b"].sum() == max(int(density * 32 * 24 + 0.5), 24)
        assert masks["c"].sum() == max(int(density * 24 * 9 + 0.5), 24)
    # Where a channel has just joined, the layer behind it holds one connection more, never fewer than its share.
    for density in np.linspace(0.05, 1, 300):
        kept = int(tables.masks(density)["b"].sum())
        assert 0 <= kept - int(density * 32 * 24 + 0.5) <= 1
    whole = RandomTables(model, exclude="a").masks(0.1)
    assert set(whole) == {"b", "c"} and whole["b"][0, 0].any(axis=1).all()


def test_a_single_output_reads_channels_that_are_there():
    model = ks.sparsify(hourglass())
    for seed in range(4):
        tables = RandomTables(model, seed=seed)
        for density in (1e-6, 0.1, 0.4, 0.8):
            masks = tables.masks(density)
            # Of 9 channels, those that "a" makes are those that "b" reads.
            np.testing.assert_array_equal(masks["a"][0, 0, 0], masks["b"][0, 0, :, 0])
            assert masks["a"].sum() == max(int(np.sqrt(density) * 9 + 0.5), 1)


def test_channels_that_other_masks_cut_off_get_no_connection():
    model = ks.sparsify(chain(), include=["a", "b", "c"])
    cut = np.ones((1, 1, 7, 5))
    cut[..., 2, :] = 0
    cut[..., 4] = 0
    model.get_layer("b").assign_mask(cut)
    for density in (0.01, 0.5, 1.0):
        quietly(model, density, exclude="b")
        a, c = (np.asarray(model.get_layer(name).mask)[0, 0] for name in "ac")
        assert not a[:, 2].any() and not c[4].any()
        assert a[:, [0, 1, 3, 4, 5, 6]].any(axis=0).all() and c[:4].any(axis=1).all()
        np.testing.assert_array_equal(model.get_layer("b").mask, cut)


def test_dense_layers_stay_whole_unless_named():
    model = ks.sparsify(chain())
    quietly(model, 0.3)
    assert np.asarray(model.get_layer("d").mask).all() and not np.asarray(model.get_layer("c").mask).all()
    quietly(model, 0.3, include=["b", "d"])
    mask = np.asarray(model.get_layer("d").mask)
    assert mask.sum() == int(0.3 * mask.size + 0.5)
    dangling = ChannelGraph(model).dangling()
    assert not any(table.any() for table in dangling.values())


def test_a_density_too_low_warns_with_the_true_one():
    model = ks.sparsify(chain(), include=["a", "b", "c"])
    with pytest.warns(UserWarning, match=r"density=0.1 is too low for 3 of 3 layers.* true density is 0.\d+.*'[abc]'"):
        true = ks.random_tables(model, 0.1)
    sizes = [7 * 3, 7 * 5, 5 * 4]
    assert true == (7 + 7 + 5) / sum(sizes)
    counts = ks.count(model)["layers"]
    assert [counts[name]["connections"] for name in "abc"] == [7, 7, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ks.random_tables(model, 0.5) == pytest.approx(0.5, abs=0.02)


def test_tables_hold_through_training_and_saving(tmp_path):
    model = ks.sparsify(chain())
    quietly(model, 0.3)
    before = {path: np.asarray(layer.mask) for path, layer in sparse_layers(model).items()}
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(np.ones((4, 6, 5, 3)), np.ones((4, 3)), verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    for path, layer in sparse_layers(again).items():
        np.testing.assert_array_equal(layer.mask, before[path])
        assert not np.asarray(layer._kernel)[np.broadcast_to(before[path], layer._kernel.shape) == 0].any()
    assert RandomTables(again).density(0.3) == RandomTables(model).density(0.3)


@pytest.mark.parametrize("name", ["MobileNet", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_applications(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(96, 96, 3), classes=10)
    model = ks.sparsify(model, include=layers.Conv2D)
    tables = RandomTables(model)
    graph = ChannelGraph(model)
    for density in (1e-9, 0.01, 0.2):
        masks = tables.masks(density)
        two = {path: mask[0, 0] for path, mask in masks.items()}
        assert graph.alive(two).all() and not any(table.any() for table in graph.dangling(two).values())
        for mask in masks.values():
            least, outputs = int(density * mask.size + 0.5), mask.shape[-1]
            assert mask.sum() == least or (mask.sum() > least and mask.sum() <= max(mask.shape))
            assert mask.sum() >= outputs
