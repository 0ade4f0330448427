"""The experiments on group-wise brain damage: their networks, and small runs on made-up images."""

import json
import pathlib
import sys

import keras
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

import evidence  # noqa: E402
import groupwise_brain_damage as experiments  # noqa: E402


def test_lenet_is_caffes():
    model = experiments.lenet()
    assert model.count_params() == 20 * 26 + 50 * (500 + 1) + 500 * (800 + 1) + 10 * 501
    assert [layer.output.shape[1:3] for layer in model.layers[:4]] == [(24, 24), (12, 12), (8, 8), (4, 4)]


def test_resnet20_reads_a_checkpoint(tmp_path):
    """Shortcuts of option A: every other pixel, with zeros before and behind; all arrays of the file are used."""
    model = experiments.resnet20()
    generator = np.random.default_rng(0)
    arrays = {"linear.weight": (10, 64), "linear.bias": (10,)}
    for layer in experiments.convolutions(model):
        name, (_, _, inputs, outputs) = layer.name.replace("_", "."), layer.kernel.shape
        arrays[f"{name}.weight"] = (outputs, inputs, 3, 3)
        for part in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{name.replace('conv', 'bn')}.{part}"] = (outputs,)
    arrays = {name: generator.uniform(0.1, 1, shape).astype("float32") for name, shape in arrays.items()}
    np.savez(tmp_path / "w.npz", **arrays)
    experiments.load_weights(model, tmp_path / "w.npz")
    assert sum(array.size for array in arrays.values()) == model.count_params()
    kernel = arrays["layer2.0.conv1.weight"]
    np.testing.assert_array_equal(model.get_layer("layer2_0_conv1").kernel[1, 2], kernel[:, :, 1, 2].T)
    shortcut = keras.Model(model.get_layer("layer1_2_relu2").output, model.get_layer("layer2_0_shortcut_last").output)
    x = generator.normal(size=(2, 32, 32, 16)).astype("float32")
    expected = np.zeros((2, 16, 16, 32))
    expected[..., 8:24] = x[:, ::2, ::2]
    np.testing.assert_array_equal(shortcut(x), expected)


def made_up(name, data_dir=None):
    generator = np.random.default_rng(0)
    shape = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[name]
    images = generator.random((5200, *shape)).astype("float32")
    return images, generator.integers(0, 10, 5200), images[:64], generator.integers(0, 10, 64)


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(evidence, "load_data", made_up)
    options = ["--output", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch"), "--images", "128"]
    monkeypatch.setattr(sys, "argv", ["groupwise_brain_damage.py", *arguments, *options])
    experiments.main()
    return tmp_path / "out"


@pytest.mark.slow
def test_mnist(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiments, "LAMBDAS", {"none": (0.0,), "l21": (1e-3, 1e-2)})
    monkeypatch.setattr(experiments, "PATTERNS", ("center", "cross"))
    arguments = ["mnist", "--epochs", "1", "--fine-tuning", "1", "--densities", "0.5", "0.1"]
    folder = run(monkeypatch, tmp_path, *arguments, "--methods", "none", "l21", "patterns")
    records = json.loads((folder / "mnist.json").read_text())["records"]
    assert len(records) == 3 + 4 + 2
    for record in records:
        if "fine_tuning" in record["settings"]:
            assert record["layers"]["conv2"] == pytest.approx(record["settings"]["density"])
    assert {r["density"] for r in records if "pattern" in r["settings"]} == {0.04, 0.2}
    assert (folder / "mnist.png").stat().st_size > 1000
    assert (folder / "mnist.md").read_text().count("\n") == 2 + 1 + 4 + 2
    run(monkeypatch, tmp_path, *arguments, "--methods", "none", "l21", "patterns")
    assert capsys.readouterr().out.count("already done") == 9


@pytest.mark.slow
def test_gradual(monkeypatch, tmp_path):
    options = "--epochs 2 --steps 2 --held-out 64 --delta 0.9 --epsilon 0.23".split()
    folder = run(monkeypatch, tmp_path, "gradual", "--pretraining", "1", *options)
    record, layers = json.loads((folder / "gradual.json").read_text())["records"]
    assert len(record["history"]) == 3 and record["history"][-1]["sparsity"] > 0
    assert record["densities"]["conv2"] == pytest.approx(1 - record["history"][-1]["layers"]["conv2"])
    densities, times = record["densities"], layers["microseconds"]
    weighted = sum(densities[name] * times[name] for name in times) / sum(times.values())
    assert f"| {weighted:.3f} |" in (folder / "gradual.md").read_text()
    assert (folder / "lenet_process.png").exists() and (folder / "lenet_patterns.png").exists()
