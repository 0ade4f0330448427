import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_sparse as ks
from keras_sparse.report.tensorboard import mask_image


def network(granularity="weight"):
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(2, name="dense"),
        ]
    )
    model = ks.sparsify(model, granularity) if granularity else model
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def fit(model, folder, epochs=2, pruning=None, steps_per_execution=1, **options):
    model.compile(keras.optimizers.SGD(0.01), "mse", steps_per_execution=steps_per_execution)
    x, y = np.random.default_rng(0).random((20, 6, 6, 3)), np.ones((20, 2))
    callbacks = [pruning] if pruning else []
    callbacks += [ks.callbacks.SparsityTensorBoard(folder, **options)]
    model.fit(x, y, batch_size=2, epochs=epochs, callbacks=callbacks, verbose=0)
    return read(folder / "sparsity")


def read(folder):
    """Return `{tag: {step: value}}` of an event file."""
    found = {}
    (file,) = folder.iterdir()
    for record in tf.data.TFRecordDataset(str(file)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            array = tf.make_ndarray(value.tensor)
            plugin = value.metadata.plugin_data.plugin_name
            assert plugin == ("images" if value.tag.startswith("mask/") else "scalars")
            if plugin == "images":
                width, height, _ = array
                assert tf.io.decode_png(array[2]).shape[:2] == (int(height), int(width))
                array = tf.io.decode_png(array[2]).numpy()[..., 0] / 255.0
            found.setdefault(value.tag, {})[event.step] = array
    return found


@pytest.mark.parametrize("granularity", ["weight", "connection", None])
def test_values_at_a_step_interval(granularity, tmp_path):
    model = network(granularity)
    schedule = ks.schedules.PolynomialDecay(0.0, 0.8, 0, 16, frequency=4)
    pruning = ks.callbacks.GradualPruning(schedule)
    events = fit(model, tmp_path, pruning=pruning, update_freq=8)
    names = [record for record in pruning.history[0]["layers"]]
    assert set(events) == {"sparsity"} | {f"{kind}/{n}" for kind in ("sparsity", "threshold", "mask") for n in names}
    by_step = {record["step"]: record for record in pruning.history}
    assert list(events["sparsity"]) == [8, 16, 20]  # and the end
    for step in (8, 16, 20):
        record = by_step[min(step, 16)]
        assert float(events["sparsity"][step]) == pytest.approx(record["sparsity"], abs=1e-6)
        for name, sparsity in record["layers"].items():
            assert float(events[f"sparsity/{name}"][step]) == pytest.approx(sparsity, abs=1e-6)
    for name in names:
        layer = model.get_layer(name)
        kernel = np.asarray(layer.kernel)
        units = ks.granularity.get(granularity or "weight").reduce(np.abs(kernel), np.mean)
        assert float(events[f"threshold/{name}"][20]) == pytest.approx(units[units > 0].min(), rel=1e-5)
        mask = (ks.granularity.get(granularity or "weight").reduce(kernel != 0, np.max)).astype("float32")
        np.testing.assert_allclose(events[f"mask/{name}"][20], mask_image(mask), atol=1 / 255)


def test_epochs_batches_and_bundled_steps(tmp_path):
    assert list(fit(network(), tmp_path / "a")["sparsity"]) == [10, 20]
    assert list(fit(network(), tmp_path / "b", epochs=1, update_freq="batch")["sparsity"]) == list(range(1, 11))
    bundled = fit(network(), tmp_path / "c", update_freq=4, steps_per_execution=5)
    assert list(bundled["sparsity"]) == [5, 10, 15, 20]


def test_layers_and_masks_can_be_left_out(tmp_path):
    events = fit(network(), tmp_path, write_masks=False, exclude="dense")
    assert set(events) == {"sparsity", "sparsity/conv", "threshold/conv"}


def test_stands_beside_keras_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    model = network()
    both = [keras.callbacks.TensorBoard(tmp_path), ks.callbacks.SparsityTensorBoard(tmp_path)]
    model.fit(np.ones((4, 6, 6, 3)), np.ones((4, 2)), callbacks=both, verbose=0)
    assert {folder.name for folder in tmp_path.iterdir()} == {"train", "sparsity"}


def test_mask_images():
    mask = np.zeros((3, 3, 4, 6), "float32")
    mask[1, :, 2, 5] = 1
    image = mask_image(mask)
    assert image.shape == (64, 66) and image.max() == pytest.approx(3 / 9)
    np.testing.assert_array_equal(np.argwhere(image > 0).min(axis=0), [32, 55])
    group = np.zeros((3, 3, 4, 1), "float32")
    group[0, 1, 3] = 1  # the second tap of the last input channel
    image = mask_image(group)
    assert image.shape == (72, 64) and image[8:16, 48:].min() == 1 and image.sum() == 8 * 16
    large = (np.random.default_rng(0).random((1500, 700)) < 0.25).astype("float32")
    image = mask_image(large)
    assert image.shape == (512, 512) and image.mean() == pytest.approx(large.mean(), abs=0.01)
    assert mask_image(np.ones((1, 1, 1, 10))).shape == (64, 70) and mask_image(np.ones((5, 3))).min() == 1
