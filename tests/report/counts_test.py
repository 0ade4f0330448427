import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse import granularity as granularities
from keras_sparse.initializers import RandomMask


def masked(layer, input_shape, sparsity, seed=0):
    """Build a one-layer model and prune it at random; returns the model and its effective kernel."""
    model = keras.Sequential([keras.layers.Input(input_shape), layer])
    layer.assign_mask(np.asarray(RandomMask(sparsity, seed)(layer.mask.shape)))
    return model, np.asarray(layer.kernel)


def nested_loops(kernel, outputs):
    """Multiply-adds of a convolution, counted tap by tap: each kept weight once for every output pixel."""
    return sum(int(kernel[index] != 0) for index in np.ndindex(kernel.shape)) * outputs


@pytest.mark.parametrize("granularity", granularities.names())
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_sparse_convolution(granularity, sparsity):
    layer = ks.layers.SparseConv2D(10, (3, 5), strides=2, padding="same", granularity=granularity, name="c")
    model, kernel = masked(layer, (9, 11, 7), sparsity)
    entry = ks.count(model)["layers"]["c"]
    assert entry["params"] == kernel.size + 10
    assert entry["nnz"] == np.count_nonzero(kernel) + 10
    assert entry["sparsity"] == pytest.approx(1 - np.count_nonzero(kernel) / kernel.size)
    assert entry["connections"] == (kernel != 0).any(axis=(0, 1)).sum()
    assert entry["madds"] == nested_loops(kernel, 5 * 6)
    units = int(np.prod(layer.mask.shape))
    assert entry["bytes"]["dense"] == 4 * (kernel.size + 10)
    assert entry["bytes"]["bitmask"] == 4 * (np.count_nonzero(kernel) + 10) + -(-units // 8)


@pytest.mark.parametrize(
    ("layer", "shape", "params", "madds"),
    [
        (keras.layers.Dense(5), (4, 3), 20, 4 * 15),
        (keras.layers.Conv2D(8, 3, groups=2), (6, 6, 4), 8 * 2 * 9 + 8, 16 * 8 * 2 * 9),
        (keras.layers.Conv2D(8, 3, data_format="channels_last", dilation_rate=2), (9, 9, 1), 80, 25 * 72),
        (keras.layers.Conv1D(6, 3), (10, 2), 42, 8 * 36),
        (keras.layers.Conv3D(2, 2), (3, 3, 3, 1), 18, 8 * 16),
        (keras.layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 3), 60, 9 * 54),
        (keras.layers.SeparableConv2D(4, 3), (5, 5, 3), 27 + 12 + 4, 9 * (27 + 12)),
        (keras.layers.Conv2DTranspose(4, 3), (5, 5, 3), 112, 25 * 108),
        (keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (7, 4), 24, 7 * 24),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, keras.layers.Layer) else None,
)
def test_plain_layers(layer, shape, params, madds):
    model = keras.Sequential([keras.layers.Input(shape), layer])
    entry = ks.count(model)["total"]
    assert (entry["params"], entry["madds"]) == (params, madds)
    assert entry["nnz"] == params


def test_zeros_of_a_plain_layer_are_counted():
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3, name="d")])
    kernel = np.ones((4, 3), "float32")
    kernel[1:3] = 0
    model.layers[0].set_weights([kernel, np.zeros(3)])
    entry = ks.count(model)["layers"]["d"]
    assert (entry["nnz"], entry["connections"], entry["madds"]) == (6 + 3, 6, 6)


def test_a_stateful_model_for_batches_of_one_size():
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(3, 5), dtype="int32"),
            keras.layers.Embedding(11, 4),
            keras.layers.LSTM(6, return_sequences=True, stateful=True, name="rnn"),
            keras.layers.Dense(7, name="dense"),
        ]
    )
    model(np.ones((3, 5)))
    states = [np.asarray(state) for state in model.get_layer("rnn").states]
    entry = ks.count(model)["layers"]
    assert entry["dense"]["madds"] == 5 * 6 * 7
    assert any(state.any() for state in states)
    for state, before in zip(model.get_layer("rnn").states, states):
        np.testing.assert_array_equal(np.asarray(state), before)


def test_shared_and_nested_layers():
    inputs = keras.Input((8, 8, 4))
    shared = keras.layers.Conv2D(4, 3, padding="same", name="shared")
    block = keras.Sequential([keras.layers.Input((8, 8, 4)), shared, keras.layers.BatchNormalization()], name="block")
    model = keras.Model(inputs, shared(block(inputs)))
    counts = ks.count(model)
    assert counts["total"]["params"] == (4 * 4 * 9 + 4) + 16
    assert counts["total"]["madds"] == 2 * 64 * 4 * 4 * 9
    assert len(counts["layers"]) == 2


def test_totals_add_up_and_unknown_madds_are_left_out():
    model = keras.Sequential(
        [keras.layers.Input((5, 3)), keras.layers.LSTM(4, name="lstm"), keras.layers.Dense(2, name="d")]
    )
    counts = ks.count(model)
    lstm = counts["layers"]["lstm/lstm_cell"]
    assert lstm["params"] == 4 * 4 * (3 + 4 + 1) and lstm["madds"] is None
    assert counts["total"]["madds"] == counts["layers"]["d"]["madds"] == 8
    for key in ("params", "nnz", "connections"):
        assert counts["total"][key] == sum(entry[key] for entry in counts["layers"].values())


def test_open_input_sizes_are_given():
    model = keras.Sequential([keras.layers.Input((None, None, 3)), keras.layers.Conv2D(2, 3)])
    assert ks.count(model, input_shape=(5, 7, 3))["total"]["madds"] == 15 * 54


def test_counting_leaves_the_model_alone():
    model, _ = masked(ks.layers.SparseConv2D(4, 3), (6, 6, 2), 0.5)
    before = model.get_weights()
    ks.count(model)
    assert "call" not in vars(model.layers[0])
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_counts_of_inception_v3_are_the_published_ones():
    # Changpinyo et al. (2017), Table 1, first row: 5.71 billion multiply-adds at 299 x 299.
    model = keras.applications.InceptionV3(weights=None, include_top=False, input_shape=(299, 299, 3))
    assert ks.count(model)["total"]["madds"] / 1e9 == pytest.approx(5.71, abs=0.005)


def test_summary_prints_a_line_a_layer():
    model, kernel = masked(ks.layers.SparseConv2D(4, 3, name="conv"), (6, 6, 2), 0.5)
    lines = []
    ks.summary(model, print_fn=lines.append)
    row = next(line for line in lines if line.startswith("conv")).split()
    assert row[:5] == ["conv", "SparseConv2D", "76", str(np.count_nonzero(kernel) + 4), "50.0%"]
    assert lines[-1].startswith("total") and len({len(line) for line in lines}) == 1
