"""ks.prune: one update of GradualPruning, without `fit`."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

layers = keras.layers


def network(kind="plain"):
    keras.utils.set_random_seed(2)
    x = keras.Input((8, 8, 3))
    y = layers.GlobalAveragePooling2D()(layers.Conv2D(7, 3, activation="relu", name="conv")(x))
    model = keras.Model(x, layers.Dense(5, name="head")(y))
    return model if kind == "plain" else ks.sparsify(model, "weight")


def kernels(model):
    return {name: keras.ops.convert_to_numpy(model.get_layer(name).kernel) for name in ("conv", "head")}


@pytest.mark.parametrize("kind", ["plain", "sparse"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_uniform_magnitude(kind, sparsity):
    model = network(kind)
    before = kernels(model)
    reached = ks.prune(model, sparsity)
    zeros = total = 0
    for name, kernel in kernels(model).items():
        order = np.argsort(-np.abs(before[name]).ravel(), kind="stable")
        expected = np.zeros(kernel.size)
        kept = order[: max(1, round(kernel.size * (1 - sparsity)))]
        expected[kept] = before[name].ravel()[kept]
        np.testing.assert_array_equal(kernel.ravel(), expected)
        zeros, total = zeros + kernel.size - len(kept), total + kernel.size
    assert reached == pytest.approx(zeros / total)
    assert model.get_layer("conv")._kernel.constraint is None or kind == "sparse"


def test_every_axis_can_be_chosen():
    model = network()
    assert ks.prune(model, 0.5, "connection", "l2", "global", exclude="head") == pytest.approx(0.5, abs=0.03)
    assert (kernels(model)["head"] != 0).all()
    connections = (kernels(model)["conv"] != 0).any(axis=(0, 1))
    assert connections.sum() in (10, 11) and (kernels(model)["conv"][:, :, connections] != 0).all()
    assert ks.prune(model, 0.5, include="head", targets={"head": 0.8}) == pytest.approx(0.8)
    model = network()
    assert ks.prune(model, granularity="1:4", include="head") == pytest.approx(0.75, abs=0.02)
    assert ks.prune(network(), 0.6, allocation="erk") == pytest.approx(0.6, abs=0.01)
    model = network()
    ks.prune(model, 0.3)
    first = kernels(model)
    assert ks.prune(model, 0.2) == pytest.approx(0.3, abs=0.01)  # sparser already: stays so
    np.testing.assert_array_equal(first["conv"], kernels(model)["conv"])


def test_fine_tuning_holds_the_zeros():
    model = network()
    ks.prune(model, 0.8)
    zeros = {name: kernel == 0 for name, kernel in kernels(model).items()}
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    x, y = np.random.default_rng(0).random((16, 8, 8, 3)), np.ones((16, 5))
    model.fit(x, y, verbose=0, epochs=2, callbacks=[ks.callbacks.GradualPruning(ks.schedules.OneShot(0.8))])
    for name, kernel in kernels(model).items():
        np.testing.assert_array_equal(kernel == 0, zeros[name])


def test_a_compiled_model_goes_on_training():
    """The step that Keras has traced before is not the model's any more, and the next one is traced anew."""
    model = network()
    model.compile("sgd", "mse")
    x, y = np.random.default_rng(0).random((8, 8, 8, 3)), np.ones((8, 5))
    model.fit(x, y, verbose=0)
    ks.prune(model, 0.5)
    pruned = kernels(model)
    model.fit(x, y, verbose=0)
    assert any((kernel != pruned[name]).any() for name, kernel in kernels(model).items())


@pytest.mark.parametrize("kind", ["plain", "sparse"])
def test_saliency(kind):
    """|w dL/dw|, a batch at a time, added up over units; compared with gradients of a linear model by hand."""
    keras.utils.set_random_seed(2)
    dense = layers.Dense if kind == "plain" else ks.layers.SparseDense
    model = keras.Sequential([keras.Input((6,)), dense(4, use_bias=False, name="a")])
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(12, 6)).astype("float32"), generator.normal(size=(12, 4)).astype("float32")
    kernel = keras.ops.convert_to_numpy(model.get_layer("a").kernel)
    scores = np.zeros((6, 4))
    for begin in (0, 4, 8):
        rows = slice(begin, begin + 4)
        gradient = 2 * x[rows].T @ (x[rows] @ kernel - y[rows]) / (4 * 4)
        scores += np.abs(kernel * gradient) / 3
    ks.prune(model, 0.5, criterion=ks.criteria.Saliency((x, y), "mse", batch_size=4, batches=3))
    kept = keras.ops.convert_to_numpy(model.get_layer("a").kernel) != 0
    np.testing.assert_array_equal(kept.ravel(), scores.ravel() >= np.sort(scores.ravel())[12])


def test_saliency_of_units_is_that_of_removing_them():
    """To first order, the loss changes by what the criterion says when a small unit goes."""
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6, "tanh", name="a"), layers.Dense(2, name="b")])
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(32, 8)).astype("float32"), generator.normal(size=(32, 2)).astype("float32")
    kernel = keras.ops.convert_to_numpy(model.get_layer("a").kernel) * np.logspace(-3, 0, 6)
    model.get_layer("a").kernel.assign(kernel)
    model.compile("sgd", "mse")

    class Seen(ks.criteria.Saliency):
        def scores(self, kernel, granularity, name=""):
            self.seen = super().scores(kernel, granularity, name)
            return self.seen

    criterion = Seen((x, y))
    loss = model.evaluate(x, y, verbose=0)
    ks.prune(model, 0.0, "feature_map", criterion, include="a")
    for unit in (0, 1):
        without = kernel.copy()
        without[:, unit] = 0
        model.get_layer("a").kernel.assign(without)
        change = abs(model.evaluate(x, y, verbose=0) - loss)
        assert criterion.seen[0, unit] == pytest.approx(change, rel=0.1, abs=2e-6)


def test_scores_of_ones_own():
    generator = np.random.default_rng(0)
    given = {"conv": generator.random((3, 3, 3, 7)), "head": generator.random((7, 5))}
    model = network()
    ks.prune(model, 0.5, criterion=given)
    for name, kernel in kernels(model).items():
        kept = max(1, round(kernel.size / 2))
        np.testing.assert_array_equal(kernel.ravel() != 0, given[name].ravel() >= np.sort(given[name].ravel())[-kept])
    model = network()
    seen = []

    def farthest_from_one(kernel, name):
        seen.append(name)
        return np.abs(kernel - 1)

    ks.prune(model, 0.5, "feature_map", farthest_from_one)
    scores = np.abs(kernels(network())["conv"] - 1).sum(axis=(0, 1, 2))
    kept = (kernels(model)["conv"] != 0).any(axis=(0, 1, 2))
    assert set(seen) == {"conv", "head"} and kept.sum() == 4 and scores[kept].min() > scores[~kept].max()
    by_unit = {"conv": np.arange(7).reshape(1, 1, 1, 7), "head": np.arange(5).reshape(1, 5)}
    ks.prune(model := network(), 0.5, "feature_map", by_unit)
    assert (kernels(model)["head"] != 0).all(axis=0).tolist() == [False, False, False, True, True]
    for criterion, message in (
        ({"conv": given["conv"]}, "`scores` must hold an array for 'head'. Received: scores=\"'conv'\""),
        ({**given, "tail": 1}, "`scores` must be for weights that are pruned; these are 'conv', 'head'"),
        ({**given, "head": np.ones(5)}, r"`scores` must have the shape of 'head', \(7, 5\), or of its units"),
        (lambda kernel, name: np.ones(2), "`scores` must have the shape of 'conv'"),
    ):
        model = network()
        model.compile("sgd", "mse")
        pruning = ks.callbacks.GradualPruning(ks.schedules.OneShot(0.5, 1), criterion=criterion)
        with pytest.raises(ValueError, match=message):  # before training, although the update comes later
            model.fit(np.ones((4, 8, 8, 3)), np.ones((4, 5)), batch_size=1, callbacks=[pruning], verbose=0)
        assert int(model.optimizer.iterations) == 0
