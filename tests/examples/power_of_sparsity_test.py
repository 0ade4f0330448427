"""The experiments of docs/power_of_sparsity.md with a budget of seconds, on random images."""

import json
import pathlib
import sys

import numpy as np
import pytest

import keras_sparse as ks

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))  # as for a script that lies there

import evidence  # noqa: E402
import power_of_sparsity as experiment  # noqa: E402


def random_images(name, data_dir=None):
    generator = np.random.default_rng(0)
    shape = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[name]
    arrays = []
    for examples in (128, 40):
        arrays += [generator.random((examples, *shape), "float32"), generator.integers(0, 10, examples)]
    return tuple(arrays)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs the script and returns its records and its table."""
    monkeypatch.setattr(evidence, "load_data", random_images)

    def run(figure, *arguments):
        monkeypatch.setattr(
            sys, "argv", ["power_of_sparsity.py", "--figure", str(figure), "--output", str(tmp_path), *arguments]
        )
        experiment.main()
        assert (tmp_path / f"figure{figure}.png").stat().st_size > 10_000
        records = json.loads((tmp_path / f"figure{figure}.json").read_text())["records"]
        return records, (tmp_path / f"figure{figure}.md").read_text()

    return run


@pytest.mark.parametrize("figure", [2, 3])
def test_networks_of_both_kinds_have_about_the_share_of_the_weights(figure):
    whole = ks.count(experiment.smaller_network(figure, "multiplier", 1.0, 0))["layers"]
    for method in ("multiplier", "sparse"):
        model = experiment.smaller_network(figure, method, 0.25, 0)
        counts = ks.count(model)["layers"]
        # The inner convolutions; the first one's inputs are not fewer, the last one's outputs are.
        name = experiment.convolutions(model)[1]
        assert counts[name]["nnz"] == pytest.approx(0.25 * whole[name]["nnz"], rel=0.02)


@pytest.mark.slow
def test_sizes(run):
    options = ["--steps", "2", "--rounds", "1", "--densities", "1", "0.1"]
    records, table = run(2, *options)
    runs = [r for r in records if "accuracy" in r]
    assert [(r["settings"]["method"], r["settings"]["density"]) for r in runs] == [
        ("sparse", 0.1),
        ("multiplier", 1.0),
        ("multiplier", 0.1),
    ]
    (latency,) = [r for r in records if "milliseconds" in r]
    assert set(latency["milliseconds"]) == {"multiplier 1", "multiplier 0.1", "sparse 0.1"}
    assert table.count("depth multiplier") == 2 and table.count("random tables") == 1
    assert len(run(2, *options)[0]) == len(records)  # nothing is made again


@pytest.mark.slow
def test_growth(run):
    records, table = run(6, "--steps", "48", "--rounds", "1")
    runs = records[0]["runs"]
    assert list(runs) == ["dense", "dense, half of the steps", "T = 3", "T = 4", "T = 6"]
    for name, run in runs.items():
        assert run["final"]["step"] == (24 if "half" in name else 48)
        assert run["final"]["density"] == 1
        assert 0 < run["final"]["wall_seconds"]
    assert "accuracy of dense reached after" in table
