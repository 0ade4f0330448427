"""Group lasso and its truncated form: values and gradients against NumPy, masks, sharing, files."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks
from keras_sparse import granularity as granularities
from keras_sparse.regularizers import GroupLasso, TruncatedGroupLasso

KERNEL = np.random.default_rng(0).standard_normal((3, 5, 4, 7))
DENSE = np.random.default_rng(1).standard_normal((9, 5))
UNIT_AXES = {"weight": (), "connection": (0, 1), "group": (3,), "feature_map": (0, 1, 2), "channel": (0, 1, 3)}


def norms(kernel, granularity):
    axes = UNIT_AXES[granularity] if kernel.ndim == 4 else {"group": (1,), "weight": ()}[granularity]
    return np.sqrt(np.sum(kernel**2, axis=axes, keepdims=True)) if axes else np.abs(kernel)


def gradient(regularizer, kernel, dtype="float64"):
    kernel = tf.constant(kernel, dtype)
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        value = regularizer(kernel)
    return float(value), tape.gradient(value, kernel).numpy()


def with_sparsity(kernel, granularity, sparsity):
    granularity = granularities.get(granularity)
    units = np.prod(granularity.mask_shape(kernel.shape))
    scores = np.random.default_rng(2).random(granularity.mask_shape(kernel.shape))
    return kernel * granularity.mask(scores, int(round(units * (1 - sparsity))))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("granularity", UNIT_AXES)
def test_values_and_gradients(granularity, sparsity):
    """Equations 3 to 5: K / norm below theta, zero above, and zero instead of 0 / 0."""
    kernel = with_sparsity(KERNEL, granularity, sparsity)
    sizes = norms(kernel, granularity)
    alive = sizes[sizes > 0]
    theta = float(np.median(alive)) if alive.size else 1.0
    direction = np.divide(kernel, sizes, out=np.zeros_like(kernel), where=np.broadcast_to(sizes, kernel.shape) > 0)

    value, slope = gradient(GroupLasso(0.3, granularity), kernel)
    np.testing.assert_allclose(value, 0.3 * sizes.sum(), rtol=1e-7)
    np.testing.assert_allclose(slope, 0.3 * direction, rtol=1e-6, atol=1e-12)

    truncated = TruncatedGroupLasso(0.3, theta, granularity)
    theta = float(truncated.theta)
    value, slope = gradient(truncated, kernel)
    np.testing.assert_allclose(value, 0.3 * np.minimum(sizes, theta).sum(), rtol=1e-6)
    np.testing.assert_allclose(slope, 0.3 * direction * (sizes < theta), rtol=1e-6, atol=1e-12)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("taps", [True, False])
def test_blocks(taps):
    """Tiles at the edges are smaller: 4 x 7 channels in tiles of 3 x 2."""
    block = granularities.block(3, 2, taps=taps)
    sizes, directions = {}, np.zeros_like(KERNEL)
    for index in np.ndindex(*KERNEL.shape):
        i, j, s, t = index
        sizes.setdefault((i, j, s // 3, t // 2) if taps else (s // 3, t // 2), []).append(index)
    total = 0.0
    for indices in sizes.values():
        where = tuple(np.transpose(indices))
        size = np.sqrt((KERNEL[where] ** 2).sum())
        total += size
        directions[where] = KERNEL[where] / size
    value, slope = gradient(GroupLasso(0.3, block), KERNEL)
    np.testing.assert_allclose(value, 0.3 * total, rtol=1e-6)
    np.testing.assert_allclose(slope, 0.3 * directions, rtol=1e-6, atol=1e-12)


def test_gradients_numerically():
    for regularizer in (GroupLasso(0.3), TruncatedGroupLasso(0.3, theta=2.5)):
        _, slope = gradient(regularizer, KERNEL)
        for index in [(0, 0, 0, 0), (2, 4, 3, 6), (1, 2, 1, 3)]:
            step = np.zeros_like(KERNEL)
            step[index] = 1e-5
            numeric = (float(regularizer(KERNEL + step)) - float(regularizer(KERNEL - step))) / 2e-5
            np.testing.assert_allclose(slope[index], numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_small_and_large_weights_in_low_precision(dtype):
    """Sums of squares are taken in float32: they would be 0 and infinity in float16."""
    kernel = np.stack([np.zeros((1, 1, 16)), np.full((1, 1, 16), 1e-4), np.full((1, 1, 16), 200.0)])
    value, slope = gradient(GroupLasso(1.0), kernel, dtype)
    np.testing.assert_allclose(value, 4 * (1e-4 + 200), rtol=2e-2 if dtype == "bfloat16" else 1e-3)
    np.testing.assert_allclose(slope[0].astype("float32"), 0)
    np.testing.assert_allclose(slope[1:].astype("float32"), 0.25, rtol=1e-2)


def test_theta_equal_to_a_norm_and_zero():
    kernel = np.zeros((1, 1, 2, 2))
    kernel[0, 0, 0] = 3, 4
    assert not gradient(TruncatedGroupLasso(1.0, 5.0), kernel)[1].any()  # at the norm: out of its reach
    assert gradient(TruncatedGroupLasso(1.0, 5.0001), kernel)[1].any()
    value, slope = gradient(TruncatedGroupLasso(1.0, 0.0), kernel)
    assert value == 0 and not slope.any()


def test_on_single_weights_it_is_the_l1_norm():
    np.testing.assert_allclose(
        float(GroupLasso(0.01, "weight")(KERNEL)), float(keras.regularizers.L1(0.01)(tf.constant(KERNEL))), rtol=1e-6
    )
    np.testing.assert_allclose(float(GroupLasso(1.0)(DENSE)), norms(DENSE, "group").sum(), rtol=1e-6)


def network(regularizer):
    keras.utils.set_random_seed(3)
    conv = {"granularity": "group", "kernel_regularizer": regularizer}
    model = keras.Sequential(
        [
            keras.Input((7, 6, 2)),
            ks.layers.SparseConv2D(4, 3, name="conv1", **conv),
            ks.layers.SparseConv2D(3, 3, name="conv2", **conv),
            keras.layers.Flatten(),
            keras.layers.Dense(2, name="dense"),
        ]
    )
    for layer in model.layers[:2]:
        layer.execution = "dense"  # traced in half the time
    return model


X = np.random.default_rng(5).normal(size=(16, 7, 6, 2)).astype("float32")
Y = np.random.default_rng(6).normal(size=(16, 2)).astype("float32")


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.optimizers.AdamW(0.01, weight_decay=0.1),
        keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
    ],
    ids=["momentum", "adamw", "ema"],
)
@pytest.mark.parametrize("regularizer", [GroupLasso(0.1), TruncatedGroupLasso(0.1, 0.5)], ids=["lasso", "truncated"])
def test_masks_hold_and_weights_stay_finite(regularizer, optimizer):
    """Zero groups, whose gradient is 0 / 0 on paper, beside momentum and weight decay."""
    model = network(regularizer)
    masks = {}
    for name in ("conv1", "conv2"):
        layer = model.get_layer(name)
        masks[name] = np.array(ks.initializers.RandomMask(0.5, seed=2)(layer.mask.shape))
        layer.assign_mask(masks[name])
    model.compile(optimizer.__class__.from_config(optimizer.get_config()), "mse")
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    for name, mask in masks.items():
        kernel = np.asarray(model.get_layer(name).kernel)
        assert np.isfinite(kernel).all()
        np.testing.assert_array_equal(kernel.any(axis=-1, keepdims=True), mask)


def test_the_lasso_shrinks_whole_groups():
    def smallest(regularizer):
        model = network(regularizer)
        model.compile(keras.optimizers.Adam(0.01), "mse")
        model.fit(X, Y, batch_size=4, epochs=30, verbose=0)
        sizes = np.sort(norms(np.asarray(model.get_layer("conv2").kernel), "group").ravel())
        return sizes[: sizes.size // 2].mean() / sizes[-3:].mean()

    assert smallest(GroupLasso(0.05)) < 0.5 * smallest(None)


def test_variables_change_without_a_new_trace():
    shared = TruncatedGroupLasso(1.0, theta=0.1)
    model = network(shared)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    traces = []
    step = model.train_step
    model.train_step = lambda data: traces.append(1) or step(data)

    def penalty():
        with_it = model.train_on_batch(X, Y)
        return with_it - float(np.mean((model.predict(X, verbose=0) - Y) ** 2))

    sizes = np.concatenate([norms(np.asarray(model.get_layer(n).kernel), "group").ravel() for n in ("conv1", "conv2")])
    for theta, lambda_ in ((0.1, 1.0), (0.6, 1.0), (0.6, 0.5), (0.6, 0.0)):
        shared.theta.assign(theta), shared.lambda_.assign(lambda_)
        np.testing.assert_allclose(penalty(), lambda_ * np.minimum(sizes, theta).sum(), rtol=1e-4, atol=1e-5)
    assert len(traces) == 1


def test_a_shared_theta_survives_the_file(tmp_path):
    shared = TruncatedGroupLasso(0.01, theta=0.25, granularity="group")
    model = network(shared)
    shared.theta.assign(0.7)
    shared.lambda_.assign(0.1)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    first, second = (again.get_layer(name).kernel_regularizer for name in ("conv1", "conv2"))
    assert first is second and type(first) is TruncatedGroupLasso
    assert first.get_config() == {"lambda_": 0.1, "theta": 0.7, "granularity": "group"}
    np.testing.assert_allclose(float(sum(again.losses)), float(sum(model.losses)), rtol=1e-6)
    other = keras.models.load_model(tmp_path / "m.keras").get_layer("conv1").kernel_regularizer
    assert other is not first  # the two models do not share


def test_regularizers_with_the_same_values_stay_apart(tmp_path):
    model = network(None)
    for layer in model.layers[:2]:
        layer.kernel_regularizer = TruncatedGroupLasso(0.01, theta=0.25)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    first, second = (again.get_layer(name).kernel_regularizer for name in ("conv1", "conv2"))
    assert first is not second and first.get_config() == second.get_config()


@pytest.mark.parametrize(
    "regularizer",
    [GroupLasso(0.02, "connection"), TruncatedGroupLasso(0.02, 1.5, granularities.Granularity("t", 1, 0, 0))],
)
def test_serialisation(regularizer):
    again = keras.regularizers.get(keras.regularizers.serialize(regularizer))
    assert type(again) is type(regularizer) and again.get_config() == regularizer.get_config()
