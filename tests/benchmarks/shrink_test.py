import json
import pathlib
import sys

import keras
import numpy as np
import pytest

import keras_sparse as ks

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))  # as for a script that lies there

import networks  # noqa: E402
import networks_zoo  # noqa: E402
import shrink  # noqa: E402


def tiny():
    x = inputs = keras.Input((8, 8, 3))
    for channels in (12, 16, 10):
        x = keras.layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return keras.Model(inputs, keras.layers.Dense(7)(keras.layers.GlobalAveragePooling2D()(x)))


TINY = networks_zoo.Network(tiny, (8, 8, 3))


@pytest.mark.parametrize(("density", "empty"), [(0.3, 0.25), (0.5, 0.0), (1.0, 0.5)])
def test_patterns_keep_the_density_and_empty_their_share(density, empty):
    mask = shrink.patterns(empty)((5, 3, 16, 1), density, np.random.default_rng(0))
    assert mask.sum() == min(round(density * mask.size), 15 * round(16 * (1 - empty)))
    assert (~mask.any(axis=(0, 1, 3))).sum() >= 16 * empty
    if density < 0.6:
        share = mask.mean(axis=(2, 3))
        assert share[2, 1] > share[[0, 0, 4, 4], [0, 2, 0, 2]].max()  # the centre is kept before the corners


def test_exports_are_checked_and_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(networks_zoo.NETWORKS, "tiny", TINY)
    monkeypatch.setattr("tensorflow.config.threading.set_intra_op_parallelism_threads", lambda count: None)
    monkeypatch.setattr("tensorflow.config.threading.set_inter_op_parallelism_threads", lambda count: None)
    file = tmp_path / "r.json"
    results = shrink.main(["--network", "tiny", "--batch", "2", "--repeats", "3", "--empty", ".5", "--json", str(file)])
    model = networks.sparse_network(TINY, 0.3, granularity="group", draw=shrink.patterns(0.5))
    params = results["tiny"]["params"]
    assert params["before"] == ks.count(model)["total"]["params"] > 1.2 * params["after"]
    assert set(results["tiny"]["milliseconds"][2]) == {"dense", "compact", "op"}
    assert max(results["tiny"]["error"].values()) < 1e-3
    assert "| tiny |" in capsys.readouterr().out
    assert json.loads(file.read_text())["networks"]["tiny"]["params"] == params
