"""Lemma 1 of Changpinyo et al. (2017): permuting hidden channels, weights and tables with them, changes no output.

"Any dense convolutional neural network with no cross-channel nonlinearities, distinct weights and biases, and with l
hidden layers of sizes n_1, ..., n_l, has at least n_1! ... n_l! distinct equivalent networks which produce the same
output." A table that is not permuted with its weights makes another network: that is the diversity of section 4.
"""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse.surgery.channels import ChannelGraph


def network(activation="relu"):
    x = inputs = keras.Input((7, 6, 3))
    for filters, size in ((8, 3), (10, 1), (6, (1, 3)), (5, 3)):
        x = layers.Conv2D(filters, size, padding="same")(x)
        x = layers.Activation(activation)(layers.BatchNormalization()(x))
    x = layers.Flatten()(layers.MaxPooling2D(2)(x))
    return keras.Model(inputs, layers.Dense(4)(x))


def residual():
    x = inputs = keras.Input((7, 6, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(6, 3, padding="same")(x)))
    y = layers.Conv2D(9, 3, padding="same", activation="tanh")(x)
    x = layers.Add()([x, layers.BatchNormalization()(layers.Conv2D(6, 1)(y))])
    x = layers.Concatenate()([x, layers.DepthwiseConv2D(3, padding="same")(y)])
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def filled(model, density):
    rng = np.random.default_rng(7)
    model = ks.sparsify(model)
    for variable in model.weights:
        if variable.name != "mask":
            low = 0.5 if variable.name == "moving_variance" else -1
            variable.assign(rng.uniform(low, 1.5, variable.shape))
    if density < 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            ks.random_tables(model, density, include=[ks.layers.SparseConv2D, ks.layers.SparseDense])
    return model


def permuted(model, seed, tables=True):
    """Return a copy with its hidden channels permuted: all that is tied together alike, all else apart."""
    rng = np.random.default_rng(seed)
    graph = ChannelGraph(model)
    classes, fixed = graph.ties()
    # Each channel takes the place of another one that the same layers make: of the same tensor, or of one tied to it.
    place = np.arange(graph.size)
    for call in graph.calls:
        if call.kind == "kernel":
            ids = classes[call.outputs[0].ids]
            movable = np.unique(ids[~fixed[ids] & (place[ids] == ids)])
            place[movable] = rng.permutation(movable)
    assert (place != np.arange(graph.size)).any()

    def order(channels):
        """Where each channel of the new tensor was in the old one."""
        ids = classes[channels.ids]
        where = {}
        for position, identity in enumerate(ids.tolist()):
            where.setdefault(identity, []).append(position)
        return np.array([where[place[identity]].pop(0) for identity in ids.tolist()])

    copy = keras.models.clone_model(model)
    for old, new in zip(model.layers, copy.layers):
        call = next((call for call in graph.calls if call.layer is old), None)
        if call is None or not old.weights:
            continue
        rows, columns = order(call.inputs[0]), order(call.outputs[0])
        for variable, target in zip(old.weights, new.weights):
            value = np.asarray(variable)
            if variable.name in ("kernel", "mask") and call.kind == "kernel":
                if variable.name == "kernel" or tables:
                    value = value[..., rows, :][..., columns]
            elif call.kind == "elementwise" and variable.name == "kernel":  # depthwise: (height, width, channels, 1)
                value = value[:, :, rows]
            else:
                value = value[columns]
            target.assign(value)
    return copy


@pytest.mark.parametrize("density", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("build", [network, residual])
def test_permuted_channels_and_tables_leave_the_output_unchanged(build, density):
    model = filled(build(), density)
    x = np.random.default_rng(3).normal(size=(5, 7, 6, 3)).astype("float32")
    expected = np.asarray(model(x))
    for seed in range(3):
        other = permuted(model, seed)
        different = [
            not np.array_equal(a.kernel, b.kernel)
            for a, b in zip(model.layers, other.layers)
            if isinstance(a, (ks.layers.BaseSparse, layers.DepthwiseConv2D))
        ]
        assert all(different), "the networks are distinct"
        # The sums are the same but for their order.
        np.testing.assert_allclose(np.asarray(other(x)), expected, rtol=0, atol=3e-6 * max(1, np.abs(expected).max()))
    assert np.ptp(expected, axis=0).min() > 0


def test_a_table_that_stays_makes_another_network():
    model = filled(network(), 0.25)
    x = np.random.default_rng(3).normal(size=(5, 7, 6, 3)).astype("float32")
    assert np.abs(np.asarray(permuted(model, 0, tables=False)(x)) - np.asarray(model(x))).max() > 0.01


def test_a_nonlinearity_across_channels_fixes_them():
    # The lemma's condition, where it does not hold: no channel may move past a softmax over channels.
    graph = ChannelGraph(network("softmax"))
    _, fixed = graph.ties()
    hidden = [call.outputs[0].ids for call in graph.calls if call.kind == "kernel"]
    assert all(fixed[ids].all() for ids in hidden)
