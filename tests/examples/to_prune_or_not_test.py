"""The parts of the examples that a wrong result could hide in."""

import pathlib
import sys

import keras
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))  # as for a script that lies there

import to_prune_or_not as example  # noqa: E402
import to_prune_or_not_tables as tables  # noqa: E402

import keras_sparse as ks  # noqa: E402


def test_words_are_numbered_by_frequency(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text(" b a b c\n b <unk> \n" if split == "train" else " a b\n")
    data, vocabulary = example.read_ptb(tmp_path)
    assert vocabulary == 5
    counts = np.bincount(data["train"])
    assert (np.diff(counts) <= 0).all() and counts.sum() == 8
    assert data["valid"].tolist() == [data["train"][1], data["train"][0], data["train"][4]]


def test_streams_go_on_from_batch_to_batch():
    words = np.arange(20 * 20 * 3 + 7)
    x, y = example.streams(words)
    assert x.shape == y.shape == (3 * 20, 20)
    np.testing.assert_array_equal(y, x + 1)
    for stream in (0, 7, 19):
        read = np.concatenate([x[batch * 20 + stream] for batch in range(3)])
        np.testing.assert_array_equal(read, np.arange(60) + 60 * stream)


def test_sparsity_is_chosen_to_fit_the_bytes():
    model = example.mobilenet(0.25, 4, (16, 16, 3))
    dense = example.predicted_bytes(model, 0.0)
    assert dense == 4 * model.count_params()
    sparsity = example.sparsity_for(model, dense // 2)
    fits, exceeds = (example.predicted_bytes(model, s) for s in (sparsity, sparsity - 0.001))
    assert fits <= dense // 2 < exceeds
    for weight in model.weights:  # the prediction is what such a model takes
        weight.assign(np.full(weight.shape, 0.5))
    for layer in model.layers:
        if "pointwise" in layer.name or layer.name == "logits":
            layer.kernel.assign(0.5 * (np.random.default_rng(1).random(layer.kernel.shape) >= sparsity))
    assert ks.count(model)["total"]["bytes"]["compressed"] == pytest.approx(fits, rel=0.02)


def test_mobilenet_of_the_tables_counts_as_the_papers():
    model = keras.applications.MobileNet(weights=None, alpha=0.25)
    dense, sparse = tables.describe(model, 0), tables.describe(model, 0.75)
    assert dense["matrix"] / 1e6 == pytest.approx(tables.MOBILENETS[0.25, 0], abs=0.005)
    assert dense["matrix"] + dense["normalisation"] + dense["vectors"] == model.count_params()
    assert sparse["matrix_nnz"] < 0.3 * dense["matrix"] and sparse["params"] == dense["params"]
    bytes_ = sparse["bytes"]
    assert bytes_["smallest"] <= min(bytes_["bitmask"], bytes_["csr4"], bytes_["csr5"]) < bytes_["dense"]
    assert bytes_["bitmask"] - 4 * sparse["nnz"] == pytest.approx(dense["matrix"] / 8, rel=0.05)


def test_language_models_of_the_tables_count_as_the_papers():
    for name in ("small", "medium"):
        params = tables.language_model(tables.UNITS[name]).count_params()
        assert params / 1e6 == pytest.approx(tables.LANGUAGE_MODELS[name, 0], rel=0.02)
