import os
import pathlib
import sys
import time
import types

import keras
import numpy as np
import pytest

import keras_sparse as ks

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as for a script that lies there

import common  # noqa: E402
import networks  # noqa: E402
import networks_zoo  # noqa: E402


def tiny():
    x = inputs = keras.Input((8, 8, 3))
    for channels in (12, 15):
        x = keras.layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return keras.Model(inputs, keras.layers.Dense(7)(keras.layers.GlobalAveragePooling2D()(x)))


TINY = networks_zoo.Network(tiny, (8, 8, 3))


# Known from the papers: 16 + 1 layers, 1 + 36 + 2 + 1 layers, about 20, 11.2 and 1.1 million parameters.
@pytest.mark.parametrize(
    ("name", "convolutions", "millions"), [("vgg19", 16, 20.0), ("resnet18", 20, 11.2), ("densenet40", 39, 1.07)]
)
def test_networks_have_the_layers_and_sizes_of_the_literature(name, convolutions, millions):
    model = networks_zoo.NETWORKS[name].build()
    assert model.input_shape == (None, *networks_zoo.NETWORKS[name].input_shape)
    assert sum(type(layer) is keras.layers.Conv2D for layer in model.layers) == convolutions
    assert model.count_params() / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize(("also", "pruned"), [((), 1), (("first",), 2), (("first", "classifier"), 3)])
def test_layers_keep_exactly_the_density_and_the_outer_ones_stay_dense(also, pruned):
    model = networks.sparse_network(TINY, 0.1, also=also)
    sparse = [layer for layer in model.layers if hasattr(layer, "assign_mask")]
    assert len(sparse) == pruned
    for layer in sparse:
        mask = keras.ops.convert_to_numpy(layer.mask)
        assert mask.sum() == round(mask.size * 0.1)
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        assert ((kernel != 0) == np.broadcast_to(mask != 0, kernel.shape)).all()


def test_networks_depend_on_the_seed_alone_and_keep_the_size_of_values():
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype("float32")
    first, again, other = (networks.sparse_network(TINY, 0.1, seed=seed)(x).numpy() for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()
    assert 0.01 < first.std() < 100


class Fake:
    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, seconds, log

    def turn(self, calls):
        self.log.append((self.name, calls))
        return [self.seconds] * calls


def test_turns_rotate_and_fast_engines_are_called_more_often():
    log = []
    engines = {"fast": Fake("fast", 0.01, log), "slow": Fake("slow", 1.0, log)}
    seconds = common.take_turns(engines, repeats=3, turn_seconds=0.1, settle=0)
    assert log[3:] == [("fast", 10), ("slow", 1), ("slow", 1), ("fast", 10), ("fast", 10), ("slow", 1)]
    assert {name: len(values) for name, values in seconds.items()} == {"fast": 30, "slow": 3}


def test_busy_cores_are_a_number_of_cores():
    cores = common.busy_cores(0.05)
    assert cores is None or 0 <= cores <= os.cpu_count()


def test_the_fastest_tensorflow_counts():
    times = {"op": {"ms": 2.0}, "tf_constant": {"ms": 8.0}, "tf_variable": {"ms": 6.0}, "litert": {"ms": 1.0}}
    milliseconds, ratios = networks.compare(times)
    assert milliseconds == {"op": 2.0, "tensorflow": 6.0, "litert": 1.0}
    assert ratios == {"tensorflow": 3.0, "litert": 0.5}
    record = {"network": "n", "density": 0.1, "batch": 1, "milliseconds": milliseconds, "ratios": ratios}
    assert "6.00 ( 3.00)" in networks.table([record])[1]


@pytest.fixture
def fake_engine(tmp_path):
    """An interpreter with a module `deepsparse` whose network is the sum over pixels, in NCHW."""
    (tmp_path / "deepsparse.py").write_text(
        "__version__ = '1'\n"
        "print('engines print what they like')\n"
        "class Engine:\n"
        "    def run(self, inputs):\n"
        "        return [inputs[0].sum((2, 3))]\n"
        "def compile_model(path, batch_size, num_cores):\n"
        "    if path == 'bad':\n"
        "        raise ValueError('no such network')\n"
        "    return Engine()\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def process_state(pid):
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_worker_answers_and_is_stopped_while_it_waits(fake_engine, tmp_path):
    inputs = np.random.default_rng(0).standard_normal((3, 2, 4, 5, 3)).astype("float32")
    np.save(tmp_path / "inputs.npy", inputs)
    worker = networks.Worker("deepsparse", fake_engine, "good", tmp_path / "inputs.npy", 1, str(tmp_path))
    try:
        assert worker.version == "1"
        np.testing.assert_allclose(worker.outputs(), inputs[0].sum((1, 2)), rtol=1e-5, atol=1e-5)
        seconds = worker.turn(4)
        assert len(seconds) == 4 and min(seconds) > 0
        if os.path.exists("/proc/self/stat"):
            for _ in range(100):  # a signal takes a moment
                if process_state(worker._process.pid) == "T":
                    break
                time.sleep(0.05)
            assert process_state(worker._process.pid) == "T"
    finally:
        worker.close()
    assert worker._process.returncode is not None


def test_an_engine_that_fails_or_is_missing_says_why(fake_engine, tmp_path):
    np.save(tmp_path / "inputs.npy", np.zeros((1, 1, 2, 2, 3), "float32"))
    with pytest.raises(networks.EngineError, match="no such network"):
        networks.Worker("deepsparse", fake_engine, "bad", tmp_path / "inputs.npy", 1, str(tmp_path))
    with pytest.raises(networks.EngineError, match="No module named"):
        networks.Worker("deepsparse", sys.executable, "good", tmp_path / "inputs.npy", 1, str(tmp_path))


def test_a_cell_checks_and_times_what_is_there(tmp_path, capsys):
    if not ks.ops.is_available():
        pytest.skip("the compiled ops are missing")
    model = networks.sparse_network(TINY, 0.2)
    inputs = np.random.default_rng(0).standard_normal((2, 3, 8, 8, 3)).astype("float32")
    args = types.SimpleNamespace(
        engines=["op", "tensorflow", "deepsparse"], threads=1, repeats=2, deepsparse_python=str(tmp_path / "none")
    )
    cell = networks.Cell(model, inputs, args, tmp_path)
    try:
        cell.start()
        times = cell.time()
    finally:
        cell.close()
    assert set(times) > {"op"} and set(times) <= {"op", *networks.TENSORFLOW}
    assert all(record["ms"] > 0 and record["largest_relative_error"] < 1e-4 for record in times.values())
    assert "deepsparse: left out, there is no" in capsys.readouterr().err


def test_arguments_are_checked():
    for arguments in (["--density", "0"], ["--density", "1.5"], ["--batch", "0"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            networks.parse(arguments)
