"""Depth multiplier: fewer filters everywhere, and a network that still trains."""

import math

import keras
import numpy as np
import pytest
from channel_models import chain, concatenation, conv, residual, shared
from keras import layers

import keras_sparse as ks
from keras_sparse import selection

CONVOLUTIONS = (layers.Conv2D, layers.SeparableConv2D)


def filters(model):
    return {p: v.filters for p, v in selection.flatten_layers(model).items() if isinstance(v, CONVOLUTIONS)}


def thinned(count, factor):
    return math.ceil(count * factor - 1e-9)


# Of the models in conftest those without a convolution that could have fewer filters: all their channels are the
# prediction or tied to the image.
NONE_LEFT = {"nested_twice", "sequential_built", "shared_layer", "shared_with_nested", "text"}
GROUPED = {"sequential": "the 2 groups of 'conv2' divide"}


@pytest.mark.parametrize("multiplier", [0.05, 0.5, 1.0])
def test_any_model(model, multiplier, inputs_of, request):
    name = request.node.callspec.params["model"].__name__
    before, weights = filters(model), model.get_weights()
    if name in NONE_LEFT or (name in GROUPED and multiplier < 1):
        with pytest.raises(ValueError, match=GROUPED.get(name, "hold a convolution")) as caught:
            ks.depth_multiplier(model, multiplier)
        assert str(caught.value).startswith("`model` must ") and f"model={model.name!r}" in str(caught.value)
        return
    small = ks.depth_multiplier(model, multiplier)
    assert type(small) is type(model) and [v.name for v in small.layers] == [v.name for v in model.layers]
    for old, new in zip(keras.tree.flatten(model.outputs), keras.tree.flatten(small.outputs), strict=True):
        assert old.shape == new.shape, "the prediction has the shape it had"
    assert filters(small) == {path: thinned(count, multiplier) for path, count in before.items()}
    x = inputs_of(small)
    assert all(np.isfinite(np.asarray(y)).all() for y in keras.tree.flatten(small(x, training=True)))
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not {id(v) for v in model.variables} & {id(v) for v in small.variables}


@pytest.mark.parametrize("multiplier", [0.1, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("of", ["filters", "connections"])
def test_filters_are_rounded_up(multiplier, of):
    x = inputs = keras.Input((8, 8, 3))
    for count in (1, 10, 30, 33, 64):
        x = layers.ReLU()(layers.BatchNormalization()(conv(count)(x)))
    model = keras.Model(inputs, layers.Dense(7)(layers.Flatten()(x)))
    small = ks.depth_multiplier(model, multiplier, of=of)
    factor = multiplier if of == "filters" else math.sqrt(multiplier)
    expected = [thinned(count, factor) for count in (1, 10, 30, 33, 64)]
    assert list(filters(small).values()) == expected
    kernels = [tuple(v.kernel.shape) for v in small.layers if isinstance(v, layers.Conv2D)]
    assert kernels == [(3, 3, ci, co) for ci, co in zip([3, *expected], expected)]
    assert small.layers[-1].kernel.shape == (64 * expected[-1], 7)
    if of == "connections" and multiplier < 1:
        wide = ks.count(model)["total"]["connections"] - 64 * 64 * 7
        narrow = ks.count(small)["total"]["connections"] - 64 * expected[-1] * 7
        assert narrow / wide == pytest.approx(multiplier, abs=0.07)


def test_a_tenth_of_thirty_is_three():
    model = keras.Sequential([keras.Input((4, 4, 1)), conv(30, name="a"), conv(2, name="b")])
    assert filters(ks.depth_multiplier(model, 0.1)) == {"a": 3, "b": 2}


def test_rounding():
    model = keras.Sequential([keras.Input((4, 4, 1)), conv(30, name="a"), conv(12, name="b"), layers.Dense(2)])
    eights = ks.depth_multiplier(model, 0.6, rounding=lambda n: max(8, int(n) // 8 * 8))
    assert filters(eights) == {"a": 16, "b": 8}
    seen = []
    ks.depth_multiplier(model, 0.25, of="connections", rounding=lambda n: seen.append(n) or 1)
    assert seen == [15.0, 6.0]


def test_new_weights_are_fresh_and_train():
    model = residual()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    small = ks.depth_multiplier(model, 0.5)
    assert isinstance(small.optimizer, keras.optimizers.SGD) and small.compiled
    assert filters(small) == {"stem": 3, "a": 2, "b": 3, "e": 3, "f": 3, "head": 5}
    x, y = np.random.default_rng(0).normal(size=(16, 6, 5, 3)), np.ones((16, 5))
    first = small.evaluate(x, y, verbose=0)
    small.fit(x, y, epochs=5, verbose=0)
    assert small.evaluate(x, y, verbose=0) < first


def test_shared_layers_and_nested_models():
    small = ks.depth_multiplier(shared(), 0.5, exclude=["twice", "between", "other"])
    assert filters(small) == {"twice": 4, "between": 4, "other": 4, "block/inner": 2, "join/left": 1, "head": 2}
    assert small.get_layer("join").inputs[0].shape == (None, 6, 5, 2)
    assert len(small.get_layer("twice")._inbound_nodes) >= 2
    # "twice" reads its own output and an image of four channels.
    assert filters(ks.depth_multiplier(shared(), 0.5))["between"] == 4


def test_concatenation_and_flatten():
    small = ks.depth_multiplier(concatenation(), 0.4)
    assert filters(small) == {"a": 2, "b": 2, "c": 2, "d": 2}
    assert small.get_layer("e").kernel.shape[0] == 2, "a Reshape that names its channels follows"


def test_naming_layers():
    assert filters(ks.depth_multiplier(chain(), 0.5, include="b")) == {"a": 7, "b": 3, "c": 4}
    assert filters(ks.depth_multiplier(chain(), 0.5, exclude=["a", layers.Dense])) == {"a": 7, "b": 3, "c": 2}
    assert ks.depth_multiplier(chain(), 0.5, include=["a", "d"]).output_shape == (None, 2)
    top = keras.Model(*(lambda i: (i, conv(6, name="head")(conv(4, name="a")(i))))(keras.Input((6, 5, 3))))
    assert filters(ks.depth_multiplier(top, 0.5)) == {"a": 2, "head": 6}
    assert filters(ks.depth_multiplier(top, 0.5, include=layers.Conv2D)) == {"a": 2, "head": 3}


def test_what_an_image_is_added_to_keeps_its_channels():
    x = inputs = keras.Input((6, 5, 4))
    x = layers.Add()([x, conv(4, name="tied")(conv(8, name="free")(x))])
    model = keras.Model(inputs, conv(3, name="head")(layers.Lambda(lambda t: t * 2)(x)))
    assert filters(ks.depth_multiplier(model, 0.5)) == {"free": 4, "tied": 4, "head": 3}
    behind = keras.Model(inputs, layers.Lambda(lambda t: t * 2)(conv(6, name="head")(model(inputs))))
    assert filters(ks.depth_multiplier(behind, 0.5))["head"] == 6, "a function of the prediction"


def rounded_apart():
    x = inputs = keras.Input((6, 5, 3))
    x = layers.Add(name="sum")([conv(6)(x), layers.Concatenate()([conv(3)(x), conv(3)(x)])])
    return keras.Model(inputs, layers.Dense(2)(x), name="apart")


def grouped():
    x = inputs = keras.Input((6, 5, 4))
    return keras.Model(inputs, layers.Dense(2)(conv(6, groups=2, name="g")(conv(6)(x))), name="grouped")


def mixing():
    x = inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, layers.Dense(2)(layers.Reshape((-1, 2), name="mix")(conv(4)(x))), name="mixing")


def counting():
    x = inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, layers.Dense(2)(layers.GroupNormalization(4)(conv(8)(x))), name="counting")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (rounded_apart, "equal numbers of channels together in 'sum', not 3 and 4"),
        (grouped, "2 groups of 'g' divide, not 3 and 3"),
        (mixing, "channels apart in its Reshape 'mix'"),
        (counting, "take fewer channels"),
    ],
)
def test_networks_that_cannot_be_thinned(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        ks.depth_multiplier(build(), 0.5 if build is not counting else 0.7)
    assert str(caught.value).startswith("`model` must") and f"Received: model={build().name!r}" in str(caught.value)


def test_a_narrow_network_takes_random_tables():
    # The hybrid of Table 1: half the filters, then a share of the connections.
    small = ks.sparsify(ks.depth_multiplier(residual(), 0.5), include=layers.Conv2D)
    assert ks.random_tables(small, 0.6) == pytest.approx(0.6, abs=0.05)
    dense_then = ks.depth_multiplier(ks.sparsify(residual()), 0.5)
    assert isinstance(dense_then.get_layer("a"), ks.layers.SparseConv2D)
    assert filters(dense_then) == filters(small)


SLOW = ("DenseNet121", "InceptionV3", "ResNet50", "VGG16")


@pytest.mark.parametrize("name", ["MobileNet", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_applications(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(96, 96, 3), classes=10)
    small = ks.depth_multiplier(model, 0.25)
    assert small.output_shape == (None, 10)
    before, after = filters(model), filters(small)
    heads = {"conv_preds"} & set(before)
    assert {p: after[p] for p in heads} == {p: before[p] for p in heads}
    assert all(after[path] == thinned(before[path], 0.25) for path in set(before) - heads)
    assert small(np.zeros((1, 96, 96, 3))).shape == (1, 10)
