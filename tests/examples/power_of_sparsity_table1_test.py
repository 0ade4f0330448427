"""Counts of Table 1 of Changpinyo et al. (2017)."""

import pathlib
import sys

import pytest
from keras import layers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))  # as for a script that lies there

import power_of_sparsity_table1 as example  # noqa: E402


def test_vgg16n_is_seven_times_smaller_than_vgg16():
    model = example.vgg16n()
    assert 138_357_544 / model.count_params() == pytest.approx(7, abs=0.3)
    found = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    assert [layer.filters for layer in found] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [1024]
    assert found[-1].output.shape[1:] == (1, 1, 1024) and model.output_shape == (None, 1000)
    assert len([layer for layer in model.layers if isinstance(layer, layers.MaxPooling2D)]) == 6


def test_counts_and_their_table():
    inputs = example.keras.Input((9, 7, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, use_bias=False)(inputs)))
    x = layers.Conv2D(20, 1, use_bias=False)(x)
    model = example.keras.Model(inputs, layers.Dense(5)(layers.Flatten()(x)))
    counts = example.convolutions(model)
    params = 27 * 16 + 16 * 20
    assert counts == {"madds": params * 35, "params": params, "channels": 36, "values": 36 * 35}
    assert example.with_normalization(counts) == (params * 35 + 2 * 36 * 35, params + 4 * 36)
    assert [example.eights(n) for n in (0.5, 7.9, 8, 15.9, 16.1)] == [8, 8, 8, 8, 16]
    half = example.sparse_counts(model, 0.5)
    assert half["density"] == 0.5 and half["params"] == params / 2
    rows = [{"multiplier": 1.0, "density": 0.5, "counts": half, "paper": {"madds": half["madds"], "params": 752e3}}]
    line = example.sparse_table(rows, True).splitlines()[-1]
    assert line == "| 0.5 | 0.5 | 13.2 k | 13.2 k | 15.7 k | 752 k | 376 | 520 |"
    assert example.farthest(rows)[0] == pytest.approx(1999)


@pytest.mark.slow
@pytest.mark.parametrize("row", example.MULTIPLIER_ROWS[:4], ids=str)
def test_multiples_of_8_give_the_papers_counts(row):
    multiplier, madds, params = row
    counts = example.convolutions(example.narrow(example.inception_v3(), multiplier, example.eights))
    assert f"{counts['madds']:.2g}" == f"{madds:.2g}" and f"{counts['params']:.2g}" == f"{params:.2g}"
