"""What the tests of layers share: oracles."""

import numpy as np
import pytest

import keras_sparse as ks

GRANULARITIES = ks.granularity.names()
SPARSITIES = (0.0, 0.5, 0.9, 1.0)


@pytest.fixture(scope="session")
def random_mask():
    """Return a function that draws a mask with an exact count of zeros; sparsity 1 keeps nothing."""

    def draw(shape, sparsity, seed=0):
        units = int(np.prod(shape))
        mask = np.ones(units, "float32")
        pruned = np.random.default_rng(seed).permutation(units)[: round(units * sparsity)]
        mask[pruned] = 0.0
        return mask.reshape(shape)

    return draw


@pytest.fixture(scope="session")
def conv2d_oracle():
    """Return a 2D convolution written out in NumPy float64, one tap after another."""

    def convolve(x, kernel, strides=(1, 1), padding="valid", dilation=(1, 1), groups=1):
        x, kernel = np.asarray(x, "float64"), np.asarray(kernel, "float64")
        extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation)]
        if padding == "same":
            pads = []
            for size, stride, span in zip(x.shape[1:3], strides, extent):
                total = max((-(-size // stride) - 1) * stride + span - size, 0)
                pads.append((total // 2, total - total // 2))
            x = np.pad(x, [(0, 0), *pads, (0, 0)])
        height, width = ((size - span) // stride + 1 for size, span, stride in zip(x.shape[1:3], extent, strides))
        y = np.zeros((x.shape[0], height, width, kernel.shape[3]))
        per_input, per_output = x.shape[3] // groups, kernel.shape[3] // groups
        for group in range(groups):
            outputs = slice(group * per_output, (group + 1) * per_output)
            inputs = slice(group * per_input, (group + 1) * per_input)
            for i, j in np.ndindex(*kernel.shape[:2]):
                rows = slice(i * dilation[0], i * dilation[0] + (height - 1) * strides[0] + 1, strides[0])
                columns = slice(j * dilation[1], j * dilation[1] + (width - 1) * strides[1] + 1, strides[1])
                y[..., outputs] += x[:, rows, columns, inputs] @ kernel[i, j, :, outputs]
        return y

    return convolve


@pytest.fixture(scope="session")
def assert_twins():
    """Return a check that a layer of ones as mask does what its Keras twin does, bit for bit."""

    def gradients(layer, x):
        import tensorflow as tf

        x = tf.convert_to_tensor(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.cast(y, "float32") ** 2) + sum(layer.losses)
        variables = [v for v in (layer._kernel, layer.bias) if v is not None]
        return y, tape.gradient(loss, [x, *(v.value for v in variables)])

    def check(sparse, dense, x):
        shape = (None, *x.shape[1:])
        for layer in (sparse, dense):
            assert not layer.built
            layer.build(shape)
        assert np.array_equal(sparse.kernel, dense.kernel), "initial kernels differ"
        if dense.use_bias:
            assert np.array_equal(sparse.bias, dense.bias)
        else:
            assert sparse.bias is None
        sparse_y, sparse_gradients = gradients(sparse, x)
        dense_y, dense_gradients = gradients(dense, x)
        assert sparse_y.dtype == dense_y.dtype and sparse._kernel.dtype == dense._kernel.dtype
        np.testing.assert_array_equal(sparse_y, dense_y)
        assert np.asarray(dense_y, "float32").any(), "a test of zeros proves nothing"
        # The order of a sum over the batch may differ between two runs on several threads.
        tolerance = 1e-5 if sparse.compute_dtype == "float32" else 2e-2
        for ours, theirs in zip(sparse_gradients, dense_gradients, strict=True):
            ours, theirs = np.asarray(ours, "float32"), np.asarray(theirs, "float32")
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
        assert len(sparse.losses) == len(dense.losses)
        for ours, theirs in zip(sparse.losses, dense.losses):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        for variable, twin in ((sparse._kernel, dense._kernel), (sparse.bias, dense.bias)):
            if twin is not None and twin.constraint is not None:
                np.testing.assert_array_equal(variable.constraint(variable), twin.constraint(twin))
        for probe in (shape, (3, *shape[1:])):
            assert sparse.compute_output_shape(probe) == dense.compute_output_shape(probe)
        ours = sparse.get_config()
        assert set(ours) - set(dense.get_config()) == {"granularity", "mask_initializer"}
        del ours["granularity"], ours["mask_initializer"]
        assert ours == dense.get_config()

    return check
