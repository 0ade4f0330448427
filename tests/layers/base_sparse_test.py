"""What a mask means to variables, optimizers, regularizers and constraints, whichever layer carries it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks
from keras_sparse.layers import SparseConv2D, SparseDense

LAYERS = {
    "conv": (lambda **options: SparseConv2D(5, (3, 2), granularity="weight", **options), (None, 6, 5, 3)),
    "connection": (lambda **options: SparseConv2D(5, 3, granularity="connection", **options), (None, 5, 5, 3)),
    "dense": (lambda **options: SparseDense(5, **options), (None, 7)),
}


@pytest.fixture(params=LAYERS)
def built(request):
    """A function that makes a built layer with random weights; the same for all kinds of layers."""
    make, shape = LAYERS[request.param]

    def build(**options):
        layer = make(**options)
        layer.build(shape)
        return layer

    return build


def zeros_of(layer):
    return np.broadcast_to(np.asarray(layer.mask), layer._kernel.shape) == 0


# Variables


def test_mask_is_a_non_trainable_variable_of_the_layer(built):
    layer = built()
    assert isinstance(layer.mask, keras.Variable) and not layer.mask.trainable
    assert [v.name for v in layer.trainable_weights] == ["kernel", "bias"]
    assert [v.name for v in layer.non_trainable_weights] == ["mask"]
    assert layer.mask.path == f"{layer.name}/mask"
    for trainable in (False, True):
        layer.trainable = trainable
        assert not layer.mask.trainable
    assert [v.name for v in layer.trainable_weights] == ["kernel", "bias"]
    assert np.all(np.asarray(layer.mask) == 1)


def test_kernel_before_build_raises_what_keras_raises():
    for layer in (SparseConv2D(2, 3), SparseDense(2)):
        with pytest.raises(AttributeError, match="must build the layer"):
            _ = layer.kernel


def test_mask_assign_prunes_at_once_and_a_traced_call_sees_it(built, random_mask):
    layer = built(bias_initializer="normal")
    x = tf.random.normal((2, *layer.input_spec.axes.values()) if layer._kernel.ndim == 2 else (2, 6, 5, 3))
    call = tf.function(layer)
    before = call(x)
    layer.mask.assign(random_mask(layer.mask.shape, 0.5))
    assert not np.asarray(layer.kernel)[zeros_of(layer)].any()
    np.testing.assert_allclose(call(x), layer(x), rtol=1e-6, atol=1e-6)
    assert not np.allclose(call(x), before)
    layer.mask.assign(np.zeros(layer.mask.shape))
    np.testing.assert_allclose(call(x), np.broadcast_to(layer.bias, before.shape))


def test_assign_mask_zeroes_and_weights_regrow_from_exactly_zero(built, random_mask):
    layer = built()
    raw = np.asarray(layer._kernel)
    first, second = (random_mask(layer.mask.shape, 0.5, seed) for seed in (1, 2))
    layer.assign_mask(first)
    np.testing.assert_array_equal(layer._kernel, raw * first)
    layer.assign_mask(second)
    np.testing.assert_array_equal(layer.mask, second)
    np.testing.assert_array_equal(layer._kernel, raw * first * second)
    layer.assign_mask(np.ones(layer.mask.shape, "int32"))
    np.testing.assert_array_equal(layer.kernel, raw * first * second)
    assert layer.mask.dtype == "float32"


def test_assign_mask_forgets_what_mask_assign_left_in_the_variable(built, random_mask):
    layer = built()
    mask = random_mask(layer.mask.shape, 0.5)
    layer.mask.assign(mask)
    assert np.asarray(layer._kernel)[zeros_of(layer)].all(), "the raw kernel is the test's point"
    pruned = zeros_of(layer)
    layer.assign_mask(np.ones(layer.mask.shape))
    assert not np.asarray(layer.kernel)[pruned].any() and np.asarray(layer.kernel)[~pruned].all()


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (lambda m: m[..., :-1], "have the shape of the mask"),
        (lambda m: m[None], "have the shape of the mask"),
        (lambda m: np.ones(()), "have the shape of the mask"),
        (lambda m: m * 0.5, "zeros and ones"),
        (lambda m: m * np.nan, "zeros and ones"),
        (lambda m: -m, "zeros and ones"),
    ],
)
def test_assign_mask_refuses(built, mask, rule):
    layer = built()
    kernel = np.asarray(layer.kernel)
    with pytest.raises(ValueError, match=f"`mask` must .*{rule}"):
        layer.assign_mask(mask(np.ones(layer.mask.shape, "float32")))
    np.testing.assert_array_equal(layer.kernel, kernel)


@pytest.mark.parametrize("dtype", [bool, "int64", "float64", "list", "tensor"])
def test_assign_mask_takes_any_array(dtype):
    layer = SparseDense(2)
    layer.build((None, 3))
    mask = np.array([[1, 0], [0, 1], [1, 1]])
    given = {"list": mask.tolist(), "tensor": tf.constant(mask)}.get(dtype)
    layer.assign_mask(mask.astype(dtype) if given is None else given)
    np.testing.assert_array_equal(layer.mask, mask)
    assert not np.asarray(layer._kernel)[mask == 0].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_mask_initializer(built, sparsity):
    layer = built(mask_initializer=ks.initializers.RandomMask(sparsity, seed=2))
    units = np.asarray(layer.mask).size
    assert np.asarray(layer.mask).sum() == max(1, round(units * (1 - sparsity)))
    assert not np.asarray(layer.kernel)[zeros_of(layer)].any()
    assert not np.asarray(built(mask_initializer="zeros").kernel).any()


def test_mask_initializer_must_be_binary(built):
    with pytest.raises(ValueError, match="`mask_initializer` must give zeros and ones only"):
        built(mask_initializer="glorot_uniform")


# Regularizers and constraints


class Cube(keras.regularizers.Regularizer):
    def __call__(self, kernel):
        return keras.ops.sum(keras.ops.abs(kernel) ** 3)


class PlusOne(keras.constraints.Constraint):
    def __call__(self, kernel):
        return kernel + 1.0


@pytest.mark.parametrize(
    "regularizer",
    [keras.regularizers.L1(0.1), keras.regularizers.L2(0.1), keras.regularizers.L1L2(0.1, 0.2), Cube()],
    ids=["l1", "l2", "l1l2", "own"],
)
def test_regularizer_sees_the_effective_kernel(built, regularizer, random_mask):
    layer = built(kernel_regularizer=regularizer)
    full = float(layer.losses[0])
    layer.mask.assign(random_mask(layer.mask.shape, 0.5))
    assert len(layer.losses) == 1
    effective = np.asarray(layer.kernel)
    np.testing.assert_allclose(layer.losses[0], regularizer(effective), rtol=1e-6)
    assert float(layer.losses[0]) < full
    with tf.GradientTape() as tape:
        loss = layer.losses[0]
    gradient = np.asarray(tape.gradient(loss, layer._kernel.value))
    assert not gradient[zeros_of(layer)].any() and gradient[~zeros_of(layer)].any()
    assert layer.kernel_regularizer is regularizer


CONSTRAINTS = {
    "max_norm": (lambda axis: keras.constraints.MaxNorm(0.3, axis), lambda k, norm: k * min(1, 0.3 / norm)),
    "non_neg": (lambda axis: keras.constraints.NonNeg(), lambda k, norm: np.maximum(k, 0)),
    "unit_norm": (lambda axis: keras.constraints.UnitNorm(axis), lambda k, norm: k / norm),
    "min_max_norm": (
        lambda axis: keras.constraints.MinMaxNorm(0.2, 0.3, axis=axis),
        lambda k, norm: k * np.clip(norm, 0.2, 0.3) / norm,
    ),
    # Would bring pruned weights back.
    "own": (lambda axis: PlusOne(), lambda k, norm: k + 1),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraint_sees_the_effective_kernel_and_is_masked_again(built, name, random_mask):
    make, oracle = CONSTRAINTS[name]
    axes = list(range(built()._kernel.ndim - 1))
    layer = built(kernel_constraint=make(axes))
    mask = random_mask(layer.mask.shape, 0.4)
    layer.mask.assign(mask)
    kernel = np.asarray(layer.kernel, "float64")
    expected = np.stack([oracle(k, max(np.sqrt((k**2).sum()), 1e-7)) for k in np.moveaxis(kernel, -1, 0)], axis=-1)
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.apply([tf.ones(layer._kernel.shape)], [layer._kernel])
    np.testing.assert_allclose(layer._kernel, expected * mask, rtol=1e-5, atol=1e-6)
    assert not np.asarray(layer._kernel)[zeros_of(layer)].any()


# Training

X = np.random.default_rng(0).normal(size=(12, 5, 5, 2)).astype("float32")
Y = np.random.default_rng(1).normal(size=(12, 3)).astype("float32")


def network(conv, dense, **options):
    return keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            conv(4, 3, name="conv", activation="relu", kernel_initializer=initializer(1), **options),
            keras.layers.Flatten(),
            dense(3, name="dense", kernel_initializer=initializer(2), **options),
        ]
    )


def initializer(seed):
    return keras.initializers.RandomNormal(stddev=0.4, seed=seed)


def sparse_network(random_mask, sparsity=0.5, **options):
    model = network(SparseConv2D, SparseDense, **options)
    model.get_layer("conv").mask.assign(random_mask((1, 1, 2, 4), sparsity, 3))
    model.get_layer("dense").mask.assign(random_mask((36, 3), sparsity, 4))
    return model


class Projection(keras.constraints.Constraint):
    def __init__(self, mask):
        self.mask = mask

    def __call__(self, kernel):
        return kernel * self.mask


def projected_network(sparse):
    """A plain Keras network whose constraint projects onto the mask: what training must amount to."""
    model = network(keras.layers.Conv2D, keras.layers.Dense)
    for name in ("conv", "dense"):
        mask = np.asarray(sparse.get_layer(name).mask)
        layer = model.get_layer(name)
        layer.kernel.assign(layer.kernel * mask)
        layer.kernel.constraint = Projection(mask)
    return model


class Watch(keras.callbacks.Callback):
    """Notes after each batch whether masked raw weights are zero, before any later callback could mend them."""

    def __init__(self):
        super().__init__()
        self.zero, self.kernels = [], []

    def on_train_batch_end(self, batch, logs=None):
        layers = [self.model.get_layer("conv"), self.model.get_layer("dense")]
        kernels = [np.asarray(layer._kernel, "float64") for layer in layers]
        if isinstance(layers[0], SparseConv2D):
            self.zero.append(all(not k[zeros_of(layer)].any() for k, layer in zip(kernels, layers)))
        self.kernels.append(np.concatenate([kernel.ravel() for kernel in kernels]))


OPTIMIZERS = {
    "sgd-nesterov": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "sgd-weight-decay": lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda: keras.optimizers.Adam(0.05),
    "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "lion": lambda: keras.optimizers.Lion(0.01, weight_decay=0.1),
    "accumulation": lambda: keras.optimizers.Adam(0.05, gradient_accumulation_steps=2),
    "ema-overwrite": lambda: keras.optimizers.AdamW(0.05, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=2),
    "ema-end": lambda: keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True, ema_momentum=0.7),
    "loss-scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05)),
}


def fit(model, optimizer, **options):
    model.compile(optimizer, "mse", **options)
    watch = Watch()
    model.fit(X, Y, batch_size=3, epochs=2, shuffle=False, verbose=0, callbacks=[watch])
    return watch


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_projected_training_and_masked_weights_stay_zero(name, random_mask):
    sparse = sparse_network(random_mask)
    dense = projected_network(sparse)
    ours = fit(sparse, OPTIMIZERS[name]())
    theirs = fit(dense, OPTIMIZERS[name]())
    assert len(ours.zero) == 8 and all(ours.zero)
    assert np.ptp(ours.kernels, axis=0).any(), "nothing was trained"
    np.testing.assert_allclose(ours.kernels, theirs.kernels, rtol=1e-4, atol=1e-5)
    for layer_name in ("conv", "dense"):
        layer, twin = sparse.get_layer(layer_name), dense.get_layer(layer_name)
        mask = np.asarray(layer.mask)
        # At the end of `fit` averages taken before the projection overwrite the variables.
        assert not np.asarray(layer.kernel)[zeros_of(layer)].any()
        np.testing.assert_allclose(layer.kernel, twin.kernel * mask, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.bias, twin.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [{"clipnorm": 0.01}, {"global_clipnorm": 0.01}, {"clipvalue": 0.001}], ids=str)
def test_clipping_counts_no_masked_gradient(clip, random_mask):
    sparse = sparse_network(random_mask)
    before = np.asarray(sparse.get_layer("dense").kernel)
    with tf.GradientTape() as tape:
        error = tf.reduce_mean((sparse(X[:3]) - Y[:3]) ** 2)
    gradients = tape.gradient(error, [v.value for v in sparse.trainable_variables])
    watch = Watch()
    sparse.compile(keras.optimizers.SGD(1.0, **clip), "mse")
    sparse.fit(X[:3], Y[:3], batch_size=3, verbose=0, callbacks=[watch])
    assert all(watch.zero)
    layer = sparse.get_layer("dense")
    index = next(i for i, v in enumerate(sparse.trainable_variables) if v is layer._kernel)
    own, total = np.linalg.norm(gradients[index]), np.sqrt(sum(np.sum(g**2) for g in gradients))
    if "clipvalue" in clip:
        step = np.clip(gradients[index], -0.001, 0.001)
    else:
        step = gradients[index] * 0.01 / (own if "clipnorm" in clip else total)
    np.testing.assert_allclose(before - layer.kernel, step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_training(policy, random_mask):
    keras.config.set_dtype_policy(policy)
    model = sparse_network(random_mask)
    for name in ("conv", "dense"):  # the first loss scale may overflow, which skips the step that zeroes
        model.get_layer(name).assign_mask(model.get_layer(name).mask)
    watch = fit(model, keras.optimizers.AdamW(0.01, weight_decay=0.1))
    wrapped = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert wrapped == (policy == "mixed_float16")
    assert all(watch.zero) and np.ptp(watch.kernels, axis=0).any()
    assert {v.dtype for v in model.weights} == {"float32"}
    # An overflow skips the optimizer's step: the kernel in use must be masked all the same.
    model.get_layer("dense").mask.assign(np.zeros((36, 3)))
    model.train_on_batch(X * 60000, Y)
    assert not np.asarray(model.get_layer("dense").kernel).any()


def test_training_with_regularizer_and_constraint(random_mask):
    options = {"kernel_regularizer": "l2", "kernel_constraint": keras.constraints.UnitNorm([0])}
    model = sparse_network(random_mask, **options)
    watch = fit(model, keras.optimizers.Adam(0.05))
    assert all(watch.zero)
    for name, axis in (("conv", 0), ("dense", 0)):
        norms = np.linalg.norm(np.asarray(model.get_layer(name).kernel), axis=axis)
        np.testing.assert_allclose(norms[norms > 0], 1.0, rtol=1e-3)
        assert (norms > 0).any()


def test_all_pruned_layers_train_their_biases_only(random_mask):
    model = sparse_network(random_mask, sparsity=1.0)
    watch = fit(model, keras.optimizers.AdamW(0.1))
    assert all(watch.zero) and not np.any(watch.kernels)
    assert np.asarray(model.get_layer("dense").bias).any()


def test_a_loop_of_ones_own(random_mask):
    model = sparse_network(random_mask)
    optimizer = keras.optimizers.AdamW(0.05)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, [v.value for v in variables]), variables))
        return loss

    losses = [float(step(X, Y)) for _ in range(3)]
    assert losses[-1] < losses[0]
    layer = model.get_layer("dense")
    # A mask that changes between two steps of the same trace.
    layer.assign_mask(random_mask(layer.mask.shape, 0.9, 9))
    step(X, Y)
    assert not np.asarray(layer._kernel)[zeros_of(layer)].any()
    assert np.asarray(layer._kernel)[~zeros_of(layer)].any()


def test_regrown_weights_train_on_from_zero(random_mask):
    model = sparse_network(random_mask)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.train_on_batch(X, Y)
    layer = model.get_layer("dense")
    regrown = zeros_of(layer)
    layer.assign_mask(np.ones(layer.mask.shape))
    assert not np.asarray(layer.kernel)[regrown].any()
    model.train_on_batch(X, Y)
    moved = np.asarray(layer.kernel)[regrown]
    assert moved.any() and np.abs(moved).max() < 0.2


def test_frozen_layers_keep_mask_and_kernel(random_mask):
    model = sparse_network(random_mask)
    layer = model.get_layer("dense")
    layer.trainable = False
    kernel = np.asarray(layer.kernel)
    fit(model, keras.optimizers.AdamW(0.1))
    np.testing.assert_array_equal(layer.kernel, kernel)
