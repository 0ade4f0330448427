"""What is found behind a convolution, and what must not be."""

import keras
import numpy as np
import pytest

from keras_sparse.surgery import fusion

L = keras.layers


def conv(filters=4, **options):
    return L.Conv2D(filters, 3, padding=options.pop("padding", "same"), **options)


def units_of(inputs, outputs):
    """Return the units of a model's convolutions and dense layers, in the order of its layers."""
    model = keras.Model(inputs, outputs)
    heads = [layer for layer in model.layers if type(layer) in (L.Conv2D, L.Dense)]
    found = fusion.find_units(model, heads)
    return [found[id(head)] for head in heads]


def parts(unit):
    """Return which parts a unit has, for short."""
    names = ("padding", "normalization", "addition", "activation", "pooling")
    return [name for name in names if getattr(unit, name) is not None]


@pytest.fixture
def image():
    return keras.Input((8, 6, 4))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: L.ReLU(), "relu"),
        (lambda: L.ReLU(max_value=6), "relu6"),
        (lambda: L.Activation("relu"), "relu"),
        (lambda: L.Activation("relu6"), "relu6"),
        (lambda: L.ReLU(max_value=1.0), None),
        (lambda: L.ReLU(negative_slope=0.1), None),
        (lambda: L.ReLU(threshold=0.5), None),
        (lambda: L.Activation("elu"), None),
        (lambda: L.LeakyReLU(), None),
    ],
)
def test_activations(image, layer, name):
    (unit,) = units_of(image, layer()(conv()(image)))
    assert parts(unit) == (["activation"] if name else [])
    assert unit.activation_name == (name or "linear")


def test_normalisation_then_activation(image):
    (unit,) = units_of(image, L.ReLU()(L.BatchNormalization()(conv()(image))))
    assert parts(unit) == ["normalization", "activation"]


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_nothing_is_folded_behind_an_activation(image, activation):
    (unit,) = units_of(image, L.BatchNormalization()(conv(activation=activation)(image)))
    assert parts(unit) == []
    assert unit.activation_name == ("relu" if activation == "relu" else None)


def test_a_normalisation_before_the_convolution_stays(image):
    x = L.ReLU()(L.BatchNormalization()(image))
    (unit,) = units_of(image, conv()(x))
    assert parts(unit) == []


def test_a_normalisation_of_another_axis_stays(image):
    (unit,) = units_of(image, L.BatchNormalization(axis=1)(conv()(image)))
    assert parts(unit) == []


def test_a_second_normalisation_stays(image):
    (unit,) = units_of(image, L.ReLU()(L.BatchNormalization()(L.BatchNormalization()(conv()(image)))))
    assert parts(unit) == ["normalization"]


def test_calls_with_training_stay(image):
    (unit,) = units_of(image, L.BatchNormalization()(conv()(image), training=True))
    assert parts(unit) == []
    (unit,) = units_of(image, L.ReLU()(L.Dropout(0.5)(conv()(image), training=True)))
    assert parts(unit) == []
    (unit,) = units_of(image, L.ReLU()(L.Dropout(0.5)(conv()(image), training=False)))
    assert parts(unit) == ["activation"]


@pytest.mark.parametrize("position", [0, 1])
def test_a_residual_block(image, position):
    x = L.Dropout(0.5)(L.BatchNormalization()(conv()(image)))
    (unit,) = units_of(image, L.ReLU()(L.Add()([x, image] if position == 0 else [image, x])))
    assert parts(unit) == ["normalization", "addition", "activation"]
    assert unit.position == position


def test_one_of_two_convolutions_takes_their_sum(image):
    outputs = L.ReLU()(L.Add()([L.BatchNormalization()(conv()(image)), L.BatchNormalization()(conv()(image))]))
    first, second = units_of(image, outputs)
    assert sorted([len(parts(first)), len(parts(second))]) == [1, 3]


def test_sums_that_are_no_residual(image):
    x = conv()(image)
    assert parts(units_of(image, L.Add()([x, x]))[0]) == []
    assert parts(units_of(image, L.Add()([conv()(image), image, image]))[0]) == []
    assert parts(units_of(image, L.Add()([conv()(image), L.GlobalAveragePooling2D(keepdims=True)(image)]))[0]) == []
    assert parts(units_of(image, L.Multiply()([conv()(image), image]))[0]) == []
    assert parts(units_of(image, L.Add()([conv(activation="relu")(image), image]))[0]) == []
    unknown = keras.Input((None, None, 4))  # one of the two might be broadcast
    assert parts(units_of(unknown, L.Add()([conv()(unknown), unknown]))[0]) == []


@pytest.mark.parametrize(
    ("pooling", "size"),
    [
        (lambda: L.MaxPooling2D(), 2),
        (lambda: L.MaxPooling2D(3), 3),
        (lambda: L.MaxPooling2D(2, padding="same"), 2),
        (lambda: L.MaxPooling2D(3, padding="same"), 1),  # 8 rows: the last square reaches over the edge
        (lambda: L.MaxPooling2D(3, strides=2), 1),
        (lambda: L.MaxPooling2D((2, 3)), 1),
        (lambda: L.AveragePooling2D(2), 1),
        (lambda: L.GlobalMaxPooling2D(), 1),
        (lambda: L.MaxPooling2D(data_format="channels_first"), 1),
        (lambda: L.MaxPooling2D(dtype="float16"), 1),
    ],
)
def test_pooling(image, pooling, size):
    for x in (conv()(image), conv(activation="relu")(image), L.Dropout(0.5)(L.ReLU()(conv()(image)))):
        (unit,) = units_of(image, pooling()(x))
        assert (unit.pooling is not None) == (size > 1) and unit.pool_size == size


def test_pooling_comes_last_and_once(image):
    (unit,) = units_of(image, L.MaxPooling2D()(L.MaxPooling2D()(L.ReLU()(L.BatchNormalization()(conv()(image))))))
    assert parts(unit) == ["normalization", "activation", "pooling"]
    (unit,) = units_of(image, L.BatchNormalization()(L.MaxPooling2D()(conv()(image))))
    assert parts(unit) == ["pooling"]


def test_poolings_that_stay(image):
    assert parts(units_of(image, L.MaxPooling2D()(L.ReLU()(L.Add()([conv()(image), image]))))[0]) == [
        "addition",
        "activation",
    ]
    assert parts(units_of(image, L.MaxPooling2D()(conv(activation="elu")(image)))[0]) == []
    assert parts(units_of(image, L.MaxPooling2D()(L.Dense(3)(image)))[0]) == []
    x = L.ReLU()(conv()(image))
    assert parts(units_of(image, [x, L.MaxPooling2D()(x)])[0]) == ["activation"]
    shared = L.MaxPooling2D()
    first, second = units_of(image, L.Add()([shared(conv()(image)), shared(conv()(image))]))
    assert parts(first) == parts(second) == []
    unknown = keras.Input((None, None, 4))
    assert parts(units_of(unknown, L.MaxPooling2D(padding="same")(conv()(unknown)))[0]) == []
    assert parts(units_of(unknown, L.MaxPooling2D()(conv()(unknown)))[0]) == ["pooling"]


def test_two_readers_and_outputs_in_the_middle(image):
    x = conv()(image)
    (unit,) = units_of(image, [L.ReLU()(x), L.MaxPooling2D()(x)])
    assert parts(unit) == []
    x = conv()(image)
    y = L.BatchNormalization()(x)
    assert parts(units_of(image, [x, y])[0]) == []
    assert parts(units_of(image, [y, L.ReLU()(y)])[0]) == ["normalization"]


def test_shared_layers(image):
    shared = conv()
    assert parts(units_of(image, L.ReLU()(shared(L.ReLU()(shared(image)))))[0]) == []
    relu, normalization = L.ReLU(), L.BatchNormalization()
    for unit in units_of(image, relu(conv()(relu(conv()(image))))):
        assert parts(unit) == []
    for unit in units_of(image, normalization(conv()(normalization(conv()(image))))):
        assert parts(unit) == []


def test_the_end_of_a_nested_model_stays_apart(image):
    inner_input = keras.Input((8, 6, 4))
    head = conv()
    inner = keras.Model(inner_input, L.BatchNormalization()(head(inner_input)))
    model = keras.Model(image, L.ReLU()(inner(image)))
    assert parts(fusion.find_units(model, [head])[id(head)]) == ["normalization"]
    head = conv()
    sequential = keras.Sequential([L.Input((8, 6, 4)), head, L.BatchNormalization(), L.ReLU()])
    assert parts(fusion.find_units(sequential, [head])[id(head)]) == ["normalization", "activation"]
    # Called twice, its layers still follow one another.
    model = keras.Model(image, sequential(sequential(image)))
    assert parts(fusion.find_units(model, [head])[id(head)]) == ["normalization", "activation"]


def test_padding_before_a_convolution(image):
    padded = L.ZeroPadding2D(((1, 0), (2, 1)))(image)
    assert parts(units_of(image, conv(padding="valid")(padded))[0]) == ["padding"]
    assert parts(units_of(image, conv()(padded))[0]) == []
    assert [parts(unit) for unit in units_of(image, [conv(padding="valid")(padded), padded])] == [[]]


def test_other_types_stay_apart(image):
    (unit,) = units_of(image, L.ReLU(dtype="float64")(conv()(image)))
    assert parts(unit) == []


def test_dense_layers():
    inputs = keras.Input((5,))
    (unit,) = units_of(inputs, L.ReLU()(L.Add()([L.BatchNormalization()(L.Dense(5)(inputs)), inputs])))
    assert parts(unit) == ["normalization", "addition", "activation"]


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("scale", "center"), [(True, True), (False, True), (True, False), (False, False)])
def test_folded_normalisation(use_bias, scale, center):
    generator = np.random.default_rng(3)
    normalization = L.BatchNormalization(scale=scale, center=center, epsilon=0.01)
    normalization.build((None, 5))
    normalization.set_weights([generator.random(w.shape) + 0.5 for w in normalization.get_weights()])
    kernel, bias = generator.standard_normal((3, 3, 2, 5)), generator.standard_normal(5) if use_bias else None
    inputs = generator.standard_normal((7, 3, 3, 2))
    outputs = np.tensordot(inputs, kernel, 3) + (0 if bias is None else bias)
    expected = normalization(outputs, training=False)
    folded, offset = fusion.fold_normalization(kernel, bias, normalization)
    np.testing.assert_allclose(np.tensordot(inputs, folded, 3) + offset, expected, rtol=1e-4, atol=1e-5)
