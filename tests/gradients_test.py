"""Gradients on batches: numerically right, dense under masks, and the model is left as it is."""

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.callbacks.masked_weights import masked_weights
from keras_sparse.gradients import Batches, loss_gradients

layers = keras.layers


@pytest.fixture
def double():
    """Everything in float64, losses too."""
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)


def network(kind="plain"):
    """Moving averages, a seed, a loss of its own, a regulariser: all that a forward pass may leave traces of."""
    keras.utils.set_random_seed(3)
    dense, options = layers.Dense, {}
    if kind == "sparse":
        dense, options = ks.layers.SparseDense, {"granularity": "weight"}
    model = keras.Sequential(
        [
            keras.Input((5,)),
            dense(7, "tanh", name="a", kernel_regularizer="l2", **options),
            layers.BatchNormalization(name="bn"),
            layers.Dropout(0.25, seed=1),
            layers.ActivityRegularization(0.01),
            layers.Dense(6, "tanh", kernel_regularizer="l1", bias_regularizer="l2", name="c"),
            dense(3, name="b", **options),
        ]
    )
    generator = np.random.default_rng(5)
    for name in ("a", "b"):
        layer = model.get_layer(name)
        mask = (generator.random(layer._kernel.shape) < 0.5).astype("float64")
        if kind == "sparse":
            layer.assign_mask(mask)
        else:
            layer._kernel.assign(layer._kernel * mask)
    model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
    x, y = generator.normal(size=(6, 5)), generator.normal(size=(6, 3))
    return model, (x, y, generator.random(6))


def state(model):
    optimizer = [keras.ops.convert_to_numpy(v) for v in model.optimizer.variables]
    metrics = [keras.ops.convert_to_numpy(v) for v in model.metrics_variables]
    return [keras.ops.convert_to_numpy(v) for v in model.variables] + optimizer + metrics


@pytest.mark.parametrize("kind", ["plain", "sparse"])
@pytest.mark.parametrize("loss", [None, "huber", keras.losses.MeanAbsoluteError])
def test_numerically(double, kind, loss):
    """Against differences of the loss, for kept and for pruned weights; dropout and averages as in training."""
    model, batch = network(kind)
    loss = loss() if isinstance(loss, type) else loss
    weights = masked_weights(model, exclude="c")
    before = state(model)
    gradients = loss_gradients(model, weights, batch, loss)
    for one, other in zip(before, state(model)):
        np.testing.assert_array_equal(one, other)

    def value(weight, index, step):
        """The loss with one weight moved, in a copy of the network whose mask lets it through."""
        copy, _ = network(kind)
        layer = copy.get_layer(weight.name)
        kernel = weight.kernel()
        kernel[index] += step
        if kind == "sparse":
            layer.mask.assign(np.ones_like(layer.mask))
        layer._kernel.assign(kernel)
        x, y, sample_weight = batch
        outputs = copy(x, training=True)
        if loss is None:
            return float(copy.compute_loss(x, y, outputs, sample_weight))
        function = keras.losses.get(loss)
        if isinstance(function, keras.losses.Loss):
            total = function(y, outputs, sample_weight=sample_weight)
        else:
            total = keras.ops.mean(function(y, outputs) * sample_weight)
        return float(total) + sum(float(own) for own in copy.losses)

    for weight, gradient in zip(weights, gradients):
        assert gradient.shape == weight.kernel().shape
        kernel = weight.kernel()
        kept, pruned = np.argwhere(kernel != 0), np.argwhere(kernel == 0)
        for index in map(tuple, [*kept[:3], *pruned[:3]]):
            numeric = (value(weight, index, 1e-5) - value(weight, index, -1e-5)) / 2e-5
            assert gradient[index] == pytest.approx(numeric, rel=1e-5, abs=1e-7), (weight.name, index)
        assert np.count_nonzero(gradient[kernel == 0]) > 0.9 * len(pruned)


def test_of_recurrent_and_embedding_weights():
    """Slices become arrays; what the loss does not depend on has gradient zero."""
    keras.utils.set_random_seed(3)
    x = keras.Input((4,), dtype="int32")
    y = layers.LSTM(3, name="lstm")(layers.Embedding(6, 2, name="table")(x))
    model = keras.Model(x, [layers.Dense(2, name="used")(y), layers.Dense(2, name="unused")(y)])
    tokens, target = np.array([[0, 1, 2, 1]]), np.ones((1, 2), "float32")
    weights = masked_weights(model)
    gradients = loss_gradients(model, weights, (tokens, target, None), lambda y, y_pred: (y - y_pred[0]) ** 2)
    by_name = {weight.name: gradient for weight, gradient in zip(weights, gradients)}
    assert by_name["table"].shape == (6, 2) and (by_name["table"][:3] != 0).all() and (by_name["table"][3:] == 0).all()
    assert (by_name["unused"] == 0).all() and (by_name["lstm/lstm_cell/recurrent_kernel"] != 0).any()


def test_of_a_subclassed_model_and_of_frozen_weights():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2, name="dense")

        def call(self, x):
            return self.dense(x["a"]) + x["b"]

    model, batch = Model(), ({"a": np.ones((3, 4)), "b": np.zeros((3, 2))}, np.ones((3, 2)), None)
    model(batch[0])
    model.dense.trainable = False
    (gradient,) = loss_gradients(model, masked_weights(model), batch, "mse")
    expected = np.mean(np.asarray(model(batch[0])) - 1, axis=0)
    np.testing.assert_allclose(gradient, np.tile(expected, (4, 1)), rtol=1e-5)


def test_under_a_loss_scale():
    """Half precision: the optimizer's scale carries small gradients through, and is taken out again."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype="mixed_float16", name="a")])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=2.0**12)
    model.compile(optimizer, "mse")
    batch = (np.full((2, 4), 1e-4, "float32"), np.full((2, 3), 1e-3, "float32"), None)
    (gradient,) = loss_gradients(model, masked_weights(model), batch)
    assert gradient.dtype == np.float32 and (gradient != 0).all() and (np.abs(gradient) < 1e-6).all()


# Batches.


def test_batches_of_arrays_follow_on():
    x, y = np.arange(7), np.arange(7) * 10
    taken = [[batch[0].tolist() for batch in Batches((x, y), 3, 2).take(step)] for step in range(3)]
    assert taken == [[[0, 1, 2], [3, 4, 5]], [[6, 0, 1], [2, 3, 4]], [[5, 6, 0], [1, 2, 3]]]
    inputs, targets, sample_weight = next(Batches(({"a": x}, [y, y]), 2).take())
    assert inputs["a"].tolist() == [0, 1] and [part.tolist() for part in targets] == [[0, 10]] * 2
    assert sample_weight is None
    assert next(Batches(x, 99).take())[0].tolist() == x.tolist()


def test_batches_of_datasets():
    class Own(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return np.full((2, 1), index), np.zeros(2), np.ones(2)

    batches = [(np.zeros((2, 1)), np.full(2, i)) for i in range(3)]
    assert [batch[1][0] for batch in Batches(batches, count=2).take(5)] == [0, 1]
    assert [batch[1][0] for batch in Batches(lambda: iter(batches), count=9).take()] == [0, 1, 2]
    assert [batch[1][0] for batch in Batches(lambda: (np.zeros((9, 1)), np.arange(9)), 4).take(1)] == [4]
    assert [batch[0][0, 0] for batch in Batches(Own(workers=1), count=2).take(1)] == [2, 0]
    with pytest.raises(ValueError, match="`data` must hold at least one batch"):
        list(Batches([]).take())
    for data in (None, 3, (batch for batch in batches)):
        with pytest.raises(TypeError, match="`data` must be arrays"):
            Batches(data)
