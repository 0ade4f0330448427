import numpy as np
import pytest

from keras_sparse.engine import packing


def sparse_kernel(shape, density, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal(shape).astype("float32") * (generator.random(shape) < density)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 3, 7, 5), 1), ((1, 7, 3, 8), 4), ((1, 1, 1, 1), 1), ((2, 5, 1, 6), 6)]
)
def test_connection_table_holds_exactly_the_kernel(shape, groups, density):
    kernel = sparse_kernel(shape, density)
    table = packing.connection_table(kernel, groups)
    channels, filters = shape[2:]
    rebuilt = np.zeros(shape, "float32")
    for j in range(filters):
        begin, end = table.row_splits[j : j + 2]
        inputs = table.input_channels[begin:end]
        assert (np.diff(inputs) > 0).all()
        first = j // (filters // groups) * channels
        for n in range(begin, end):
            assert 0 <= table.input_channels[n] - first < channels
            assert table.filter[n].any()
            rebuilt[:, :, table.input_channels[n] - first, j] = table.filter[n]
    np.testing.assert_array_equal(rebuilt, kernel)
    assert table.row_splits[0] == 0 and table.row_splits[-1] == len(table.filter) == len(table.input_channels)
    assert (table.filter.dtype, table.row_splits.dtype, table.input_channels.dtype) == ("float32", "int32", "int32")
    assert table.nbytes == 4 * (table.filter.size + filters + 1 + len(table.filter))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 3, 7, 5), (1, 1, 4, 3), (5, 2, 3, 1)])
def test_thinned_filter_holds_exactly_the_kernel(shape, density):
    kernel = sparse_kernel(shape, density)
    thinned = packing.thinned_filter(kernel)
    assert (np.diff(thinned.indices) > 0).all() and thinned.kernel_size == shape[:2]
    rebuilt = np.zeros(shape, "float32")
    for row, index in zip(thinned.filter, thinned.indices):
        tap, s = divmod(index, shape[2])
        assert row.any()
        rebuilt[tap // shape[1], tap % shape[1], s] = row
    np.testing.assert_array_equal(rebuilt, kernel)
    assert thinned.nbytes == 4 * (thinned.filter.size + thinned.indices.size)
