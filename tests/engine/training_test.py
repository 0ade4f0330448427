"""Training of SparseConv2D through the compiled ops: the same results as densely, chosen at run time."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks
from keras_sparse.engine import training
from keras_sparse.layers import SparseConv2D

pytestmark = pytest.mark.skipif(not ks.ops.is_available(), reason="the compiled ops are missing")

GRANULARITIES = ks.granularity.names()
EPSILON = np.finfo("float32").eps


def random_mask(shape, sparsity, seed=0):
    units = int(np.prod(shape))
    mask = np.ones(units, "float32")
    mask[np.random.default_rng(seed).permutation(units)[: round(units * sparsity)]] = 0
    return mask.reshape(shape)


def random(shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def assert_close(ours, theirs, terms, name=""):
    """Compare sums of `terms` float32 products of size one, up to the order of the terms."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    scale = max(1.0, float(np.abs(theirs).max(initial=0)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=8 * EPSILON * np.sqrt(terms) * scale, err_msg=name)


@pytest.fixture
def sparse_steps(monkeypatch):
    """Return a list that grows by the routine's name whenever it runs: in a graph, when that branch is taken."""
    ran = []

    def record(name):
        product = getattr(training, name)

        def recorded(inputs, *arguments):
            with tf.control_dependencies([tf.py_function(lambda: ran.append(name), [], [])]):
                return product(tf.identity(inputs), *arguments)

        monkeypatch.setattr(training, name, recorded)

    record("_connection")
    record("_thinned")
    return ran


def gradients(layer, x, execution):
    layer.execution = execution
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
        loss = tf.reduce_sum(y * random(y.shape, 3))
    sources = [x, *(v.value for v in layer.trainable_variables)]
    return [y, *tape.gradient(loss, sources)]


GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": "same", "strides": 2, "activation": "relu"},
    {"kernel_size": 3, "dilation_rate": (2, 1), "use_bias": False},
    {"kernel_size": 1, "activation": "tanh"},
    {"kernel_size": (1, 7), "padding": "same", "use_bias": False},
    {"kernel_size": (2, 3), "padding": "SAME", "strides": (1, 2)},
]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_outputs_and_gradients_are_those_of_the_dense_convolution(options, granularity, sparse_steps):
    layer = SparseConv2D(7, granularity=granularity, bias_initializer="ones", **options)
    x = random((2, 9, 11, 5))
    layer.build(x.shape)
    units = int(np.prod(layer.mask.shape))
    empty_rows = np.ones(layer.mask.shape, "float32") * (np.arange(layer.mask.shape[3]) % 2 == 0)
    masks = [random_mask(layer.mask.shape, sparsity) for sparsity in (0, 0.5, 0.9, 1 - 1 / units, 1)]
    for mask in (*masks, empty_rows):
        layer.mask.assign(mask)
        dense = gradients(layer, x, "dense")
        ran = len(sparse_steps)
        for ours, theirs in zip(gradients(layer, x, "sparse"), dense, strict=True):
            assert ours.shape == theirs.shape
            assert_close(ours, theirs, 200)
        assert len(sparse_steps) == ran + 1
        kernel = np.asarray(gradients(layer, x, "sparse")[2])
        assert not kernel[np.broadcast_to(mask, kernel.shape) == 0].any()


@pytest.mark.parametrize("granularity", ["weight", "connection", "group"])
def test_input_gradient_is_the_derivative(granularity):
    """The product is linear: the oracle's product of a change of the inputs is what the gradient must predict."""
    layer = SparseConv2D(6, 3, granularity=granularity, use_bias=False)
    x, change = random((2, 8, 7, 5)), random((2, 8, 7, 5), 5)
    layer.build(x.shape)
    layer.mask.assign(random_mask(layer.mask.shape, 0.6))
    y, dx, _ = gradients(layer, x, "sparse")
    kernel = np.asarray(layer.kernel, "float64")
    weights = random(y.shape, 3).astype("float64")
    windows = np.lib.stride_tricks.sliding_window_view(change.astype("float64"), (3, 3), axis=(1, 2))
    changed = np.einsum("nyxcij,ijco->nyxo", windows, kernel)
    assert np.isclose(np.sum(np.asarray(dx) * change), np.sum(weights * changed), rtol=1e-4, atol=1e-4)


def test_second_derivatives():
    def penalty_gradient(layer, x, execution):
        layer.execution = execution
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x, training=True) ** 3)
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(penalty, layer._kernel.value)

    layer = SparseConv2D(4, 3, activation="tanh")
    x = tf.constant(random((2, 6, 6, 3)))
    layer.build(x.shape)
    layer.mask.assign(random_mask(layer.mask.shape, 0.5))
    dense = penalty_gradient(layer, x, "dense")
    sparse = tf.function(lambda x: penalty_gradient(layer, x, "sparse"))(x)
    assert_close(sparse, dense, 10000)


# 16 channels and 3x3 taps: the break-even lies between densities 0.3 and 0.8 for batches of 4 images and more.
# With these images no ReLU's argument comes so close to zero that dense and sparse sums round to different sides of it.
X, Y = random((16, 12, 12, 3), 101), random((16, 4), 2)


def network(execution, granularity="connection", sparsity=0.0):
    keras.utils.set_random_seed(7)
    options = {"padding": "same", "granularity": granularity}
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            SparseConv2D(16, 3, activation="relu", name="first", **options),
            SparseConv2D(16, 3, activation="relu", name="second", **options),
            SparseConv2D(16, 1, strides=2, name="third", **options),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4),
        ]
    )
    for seed, layer in enumerate(model.layers[:3]):
        layer.mask.assign(random_mask(layer.mask.shape, sparsity, seed))
        layer.execution = execution
    return model


def fit(model, epochs=2, **options):
    return model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **options)


def assert_same_weights(model, other, tolerance=2e-4):
    for ours, theirs in zip(model.weights, other.weights, strict=True):
        theirs = np.asarray(theirs)
        scale = max(np.abs(theirs).max(), 1e-3)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale, err_msg=ours.path)


@pytest.mark.parametrize(
    ("optimizer", "options", "granularity"),
    [
        (lambda: keras.optimizers.SGD(0.05), {}, "connection"),
        (lambda: keras.optimizers.SGD(0.05, momentum=0.9), {"steps_per_execution": 2}, "group"),
        # Adam divides by the size of gradients, rounding errors included, unless epsilon is beyond these.
        (lambda: keras.optimizers.AdamW(0.01, epsilon=1e-3), {}, "weight"),
        (lambda: keras.optimizers.Adam(0.01, epsilon=1e-3), {"run_eagerly": True}, "connection"),
    ],
    ids=["sgd", "momentum", "adamw", "eager"],
)
def test_training_gives_the_weights_of_dense_training(optimizer, options, granularity, sparse_steps):
    models = []
    for execution in ("dense", "sparse"):
        models.append(network(execution, granularity, 0.8))
        models[-1].compile(optimizer(), "mse", **options)
        fit(models[-1])
    assert len(sparse_steps) == 3 * 8
    assert_same_weights(*models)


def test_choice_follows_the_mask_without_retracing(sparse_steps):
    traces, densities = [], []

    def loss(y, p):
        traces.append(len(densities))
        return tf.reduce_mean((y - p) ** 2)

    class Observe(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            densities.append(float(np.mean(self.model.get_layer("second").mask)))
            self.ran = len(sparse_steps)

        def on_train_batch_end(self, batch, logs=None):
            # The third layer's strided 1x1 kernel breaks even elsewhere.
            limit = training.break_even((3, 3, 16, 16), 4 * 12 * 12)
            assert (len(sparse_steps) > self.ran) == (densities[-1] < limit)

    model = network("auto")
    for name in ("first", "third"):
        model.get_layer(name).execution = "dense"
    model.compile("sgd", loss)
    schedule = ks.schedules.PolynomialDecay(0.0, 0.9, begin_step=2, end_step=12, frequency=2)
    fit(model, epochs=4, callbacks=[ks.callbacks.GradualPruning(schedule, include="second"), Observe()])
    assert 0 < len(sparse_steps) < len(densities) == 16
    assert densities[0] == 1 and densities[-1] == pytest.approx(0.1, abs=0.01)
    model.get_layer("second").mask.assign(np.ones((1, 1, 16, 16)))
    ran = len(sparse_steps)
    fit(model, epochs=1)
    assert len(sparse_steps) == ran
    assert max(traces) <= 1, "traced again"

    def same(execution):
        other = network(execution)
        other.compile("sgd", "mse")
        fit(other, epochs=4, callbacks=[ks.callbacks.GradualPruning(schedule, include="second")])
        return other

    assert_same_weights(same("auto"), same("dense"))


def test_masks_that_come_from_files_and_checkpoints(sparse_steps, tmp_path):
    pruned, model = network("sparse", sparsity=0.8), network("sparse")
    for each in (pruned, model):
        each.compile("sgd", "mse")
    fit(pruned, epochs=1)
    pruned.save_weights(tmp_path / "m.weights.h5")
    checkpoint = tf.train.Checkpoint(model=pruned).write(str(tmp_path / "checkpoint"))
    fit(pruned, epochs=1)
    for load in (
        lambda: model.load_weights(tmp_path / "m.weights.h5"),
        lambda: tf.train.Checkpoint(model=model).read(checkpoint).expect_partial(),
    ):
        fit(model, epochs=1)  # traced, at other masks
        load()
        fit(model, epochs=1)
        assert_same_weights(model, pruned)
        model.get_layer("second").mask.assign(np.ones((1, 1, 16, 16)))


def test_saving_in_the_middle_of_training(tmp_path):
    model, twin = network("sparse", sparsity=0.8), network("dense", sparsity=0.8)
    for each in (model, twin):
        each.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        fit(each, epochs=1)
    assert [w.name for w in model.weights] == [w.name for w in twin.weights]
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.get_layer("second").get_config() == model.get_layer("second").get_config()
    for layer in again.layers[:3]:
        assert layer.execution == "auto"
        layer.execution = "sparse"
    for each in (again, twin):
        fit(each, epochs=1)
    assert_same_weights(again, twin)
    stripped = ks.strip(again)
    assert not any(isinstance(layer, SparseConv2D) for layer in stripped.layers)
    np.testing.assert_array_equal(stripped(X), again(X))
    keras.models.clone_model(again)
    copied = copy.deepcopy(again.get_layer("second"))
    np.testing.assert_array_equal(copied.kernel, again.get_layer("second").kernel)
    assert copied.execution == "auto"


SERVE = """
import sys
import numpy as np
import tensorflow as tf
data = np.load(sys.argv[1] + "/data.npz")
for name in ("exported", "saved"):
    model = tf.saved_model.load(f"{sys.argv[1]}/{name}")
    outputs = model.serve(data["x"]) if name == "exported" else list(
        model.signatures["serving_default"](tf.constant(data["x"])).values())[0]
    np.testing.assert_allclose(outputs, data["y"], rtol=1e-5, atol=1e-5)
assert "keras_sparse" not in sys.modules
print("served")
"""


def test_exports_by_keras_load_without_the_ops(run_python, tmp_path):
    model = network("sparse", sparsity=0.8)
    model.compile("sgd", "mse")
    fit(model, epochs=1)
    model.export(tmp_path / "exported", verbose=False)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    np.savez(tmp_path / "data.npz", x=X, y=np.asarray(model(X)))
    assert "served" in run_python(SERVE, tmp_path)


def test_xla_gets_the_dense_convolution(sparse_steps):
    models = []
    for jit_compile in (True, False):
        models.append(network("sparse", sparsity=0.8))
        models[-1].compile("sgd", "mse", jit_compile=jit_compile)
        fit(models[-1], epochs=1)
        assert bool(sparse_steps) is not jit_compile
    assert_same_weights(*models)
    layer = models[0].get_layer("second")
    assert layer.supports_jit
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    x = random((1, 5, 5, 16))
    assert_close(compiled(x), layer(x, training=True), 144)


def steps_of(layer, x, sparse_steps, **call):
    before = len(sparse_steps)
    layer(x, **{"training": True, **call})
    return len(sparse_steps) - before


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "mixed_float16"},
        {"dtype": "mixed_bfloat16"},
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
        {"groups": 2},
    ],
    ids=str,
)
def test_what_the_ops_do_not_take_is_dense(options, sparse_steps):
    layer = SparseConv2D(8, 3, **options)
    layer.execution = "sparse"
    x = tf.cast(random((2, 6, 6, 4)), layer.compute_dtype)
    layer.build(x.shape)
    layer.mask.assign(random_mask(layer.mask.shape, 0.9))
    assert steps_of(layer, x, sparse_steps) == 0


def test_when_the_dense_convolution_is_used(sparse_steps, monkeypatch):
    x = random((2, 12, 12, 16))

    def layer(cls=SparseConv2D):
        result = cls(16, 3)
        result.build(x.shape)
        result.mask.assign(random_mask(result.mask.shape, 0.9))
        return result

    assert steps_of(layer(), x, sparse_steps) == 1
    assert steps_of(layer(), x, sparse_steps, training=False) == 0
    assert steps_of(layer(), x, sparse_steps, training=None) == 0
    never = layer()
    never.execution = "dense"
    assert steps_of(never, x, sparse_steps) == 0

    class Own(SparseConv2D):
        def convolution_op(self, inputs, kernel):
            return 2 * super().convolution_op(inputs, kernel)

    assert steps_of(layer(Own), x, sparse_steps) == 0
    with monkeypatch.context() as patch:
        devices = [*tf.config.get_visible_devices(), tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
        patch.setattr(tf.config, "get_visible_devices", lambda *_: devices)
        assert steps_of(layer(), x, sparse_steps) == 0
    monkeypatch.setattr(SparseConv2D, "_training_engine", None)  # as without the library, or under JAX
    assert steps_of(layer(), x, sparse_steps) == 0


@pytest.mark.parametrize("mode", ["full", "activations"])
def test_rematerialization(mode, sparse_steps):
    models = []
    for execution in ("sparse", "dense"):
        keras.utils.set_random_seed(7)
        with keras.RematScope(mode=mode):
            layer = SparseConv2D(4, 3, activation="relu")
        models.append(keras.Sequential([keras.Input((12, 12, 3)), layer, keras.layers.GlobalAveragePooling2D()]))
        layer.mask.assign(random_mask(layer.mask.shape, 0.5))
        layer.execution = execution
        models[-1].compile("sgd", "mse")
        fit(models[-1], epochs=1)
    assert len(sparse_steps) >= 4
    assert_same_weights(*models)


def test_activation_that_is_a_layer_with_weights(sparse_steps):
    models = []
    for execution in ("auto", "dense"):
        layer = SparseConv2D(16, 3, activation=keras.layers.PReLU(shared_axes=[1, 2], alpha_initializer="ones"))
        models.append(keras.Sequential([keras.Input((12, 12, 3)), layer, keras.layers.GlobalAveragePooling2D()]))
        layer._kernel.assign(random(layer._kernel.shape))
        layer.mask.assign(random_mask(layer.mask.shape, 0.9))
        layer.execution = execution
        models[-1].compile("sgd", "mse")
        models[-1].fit(X, np.zeros((16, 16)), epochs=2, shuffle=False, verbose=0)
    assert len(sparse_steps) == 2
    assert_same_weights(*models)


def test_lora():
    layer = SparseConv2D(7, 3, lora_rank=2)
    x = random((2, 6, 7, 4))
    layer.build(x.shape)
    layer.lora_kernel_b.assign(random(layer.lora_kernel_b.shape))
    layer.mask.assign(random_mask(layer.mask.shape, 0.5))
    for ours, theirs in zip(gradients(layer, x, "sparse"), gradients(layer, x, "dense"), strict=True):
        assert_close(ours, theirs, 200)


def test_sizes_known_at_run_time_only(sparse_steps):
    layer = SparseConv2D(16, 3, strides=2, padding="valid")
    layer.build((None, None, None, 16))
    layer.mask.assign(random_mask(layer.mask.shape, 0.8))
    run = tf.function(
        lambda x: layer(x, training=True), input_signature=[tf.TensorSpec((None, None, None, 16), "float32")]
    )
    for shape, is_sparse in (((8, 33, 35, 16), 1), ((1, 3, 3, 16), 0), ((0, 9, 9, 16), 0)):
        x = random(shape)
        before = len(sparse_steps)
        assert_close(run(x), layer(x), 144)
        assert len(sparse_steps) - before == is_sparse


def test_execution_is_checked_and_no_part_of_the_model():
    layer = SparseConv2D(4, 3)
    assert layer.execution == "auto"
    with pytest.raises(ValueError, match=r"`execution` must be one of .*'sparse'.*Received: execution='always'"):
        layer.execution = "always"
    layer.execution = "sparse"
    assert "execution" not in layer.get_config()


def test_break_even():
    limit = training.break_even
    at = [limit((3, 3, 64, 64), pixels) for pixels in (64, 256, 1024, 16384)]
    assert at == sorted(at) and 0.7 < at[-1] < 0.9
    # Minimal filtering makes 3x3 kernels without strides worth more than others of several taps.
    assert 0.5 < limit((5, 5, 64, 64), 16384) < at[-1]
    assert 0 < limit((1, 1, 64, 64), 16384) < at[-1]
    assert limit((3, 3, 64, 64), 16384, strided=True) < at[-1]
    assert limit((1, 1, 3, 64), 10**9) <= 0
    assert limit((3, 3, 64, 64), 16384, thinned=True) == pytest.approx(0.6, abs=0.1)
    assert float(limit((3, 3, 64, 64), tf.constant(256.0))) == pytest.approx(at[1])
