import re

import keras
import pytest

from keras_sparse import selection


@pytest.fixture
def model():
    inner = keras.Sequential(
        [keras.layers.Input((4,)), keras.layers.Dense(4, name="first"), keras.layers.ReLU(name="act")], name="block"
    )
    inputs = keras.Input((4,))
    shared = keras.layers.Dense(4, name="shared")
    x = shared(inner(shared(inputs)))
    x = keras.layers.Reshape((2, 2), name="rows")(x)
    x = keras.layers.TimeDistributed(keras.layers.Dense(3, name="wrapped"), name="steps")(x)
    return keras.Model(inputs, x)


def test_flatten_layers_opens_models_and_wrappers_and_lists_shared_layers_once(model):
    paths = list(selection.flatten_layers(model))
    assert paths == ["shared", "block/first", "block/act", "rows", "steps", "steps/wrapped"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ["shared", "block/first", "steps/wrapped"]),
        ("shared", None, ["shared"]),
        ("first", None, ["block/first"]),
        ("block/first", None, ["block/first"]),
        ("block/.*", None, ["block/first"]),
        (re.compile("s.*"), None, ["shared", "steps/wrapped"]),
        (keras.layers.Dense, "shared", ["block/first", "steps/wrapped"]),
        (["first", "shared"], None, ["shared", "block/first"]),
        (None, ["rows", ".*wrapped"], ["shared", "block/first"]),
        (None, keras.layers.Dense, []),
    ],
)
def test_select(model, include, exclude, expected):
    layers = selection.flatten_layers(model)
    dense = {path: layer for path, layer in layers.items() if isinstance(layer, keras.layers.Dense)}
    assert list(selection.select(dense, include, exclude, known=layers)) == expected


def test_patterns_match_whole_names_only(model):
    with pytest.raises(ValueError, match="`include` must match a layer; the layers are 'shared'"):
        selection.select(selection.flatten_layers(model), include="share")


def test_kernel_variable():
    dense, convolution, relu = keras.layers.Dense(2), keras.layers.Conv2DTranspose(2, 3), keras.layers.ReLU()
    assert selection.kernel_variable(dense) is None
    dense.build((None, 3))
    convolution.build((None, 5, 5, 4))
    assert selection.kernel_variable(dense).shape == (3, 2)
    assert selection.kernel_variable(convolution).shape == (3, 3, 2, 4)
    assert selection.kernel_variable(relu) is None
