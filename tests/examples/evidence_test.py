"""Results of the experiments: what a reader of the file needs, and no run made twice."""

import pathlib
import sys

import keras
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))  # as for a script that lies there

import evidence  # noqa: E402


def test_a_run_is_made_once_and_found_by_its_settings(tmp_path):
    made = []

    def train(density, seed, layers):
        made.append(density)
        return {
            "accuracy": np.float32(0.5) + density,
            "draw": keras.random.uniform(()).numpy(),
            "layers_seen": len(layers),
        }

    path = tmp_path / "results.json"
    first = evidence.Results(path).run(train, density=0.1, seed=3, layers=(1, 2))
    assert first["accuracy"] == pytest.approx(0.6) and first["layers_seen"] == 2
    assert {"command", "machine", "wall_seconds", "process_seconds", "versions"} <= set(first)
    again = evidence.Results(path)  # as a second process would
    assert again.run(train, density=0.1, seed=3, layers=(1, 2)) == first
    other = again.run(train, density=0.2, seed=3, layers=(1, 2))
    assert made == [0.1, 0.2]
    assert other["draw"] == first["draw"]  # drawn from the same seed
    assert evidence.Results(path).find(density=0.2) == [other]
    assert evidence.Results(path).find(seed=3) == [first, other]


def test_an_interrupted_run_leaves_the_finished_ones(tmp_path):
    path = tmp_path / "results.json"
    results = evidence.Results(path)
    results.run(lambda seed: {"a": 1}, seed=0)

    def fail(seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.run(fail, seed=1)
    assert [record["settings"] for record in evidence.Results(path).records] == [{"seed": 0}]


def test_digits_are_images_in_the_unit_interval():
    train_x, train_y, test_x, test_y = evidence.load_data("digits")
    assert train_x.shape == (1437, 8, 8, 1) and test_x.shape == (360, 8, 8, 1)
    assert len(train_y) == 1437 and set(test_y) == set(range(10))
    assert train_x.dtype == np.float32 and train_x.min() == 0.0 and train_x.max() == 1.0


def test_mean_and_spread():
    assert evidence.mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert evidence.mean_and_spread([4.0]) == (4.0, 0.0)


def test_table_has_a_row_for_each_record():
    table = evidence.markdown_table(["a", "b"], [["x", 1], ["y", 2]])
    assert table.splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1 |", "| y | 2 |"]
