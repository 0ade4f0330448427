import hashlib
import json
import os
import re
import tracemalloc

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.initializers import RandomMask
from keras_sparse.storage import models


def network(dtype=None):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", dtype=dtype, name="conv")(inputs)
    x = keras.layers.BatchNormalization(dtype=dtype, name="norm")(x)
    block = keras.Sequential([keras.Input((8, 8, 8)), keras.layers.DepthwiseConv2D(3), keras.layers.Conv2D(5, 1)])
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(block(x)))
    return keras.Model(inputs, keras.layers.Dense(4, dtype=dtype, name="dense")(x))


def sparse_network(granularity="weight", sparsity=0.9, dtype=None):
    model = ks.sparsify(network(dtype), granularity)
    for layer in model.layers:
        if isinstance(layer, ks.layers.BaseSparse):
            layer.assign_mask(np.asarray(RandomMask(sparsity)(layer.mask.shape)))
    return model


def train(model, epochs=1):
    generator = np.random.default_rng(0)
    x, y = generator.random((12, 8, 8, 3), "float32"), generator.random((12, 4), "float32")
    model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    return x


def assert_same(a, b):
    for one, other in zip(a.weights, b.weights, strict=True):
        assert (one.name, one.dtype) == (other.name, other.dtype)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=one.path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "mixed_float16"])
@pytest.mark.parametrize("granularity", ["weight", "connection", "group"])
def test_a_sparse_model_comes_back(granularity, dtype, tmp_path):
    model = sparse_network(granularity, dtype=dtype)
    report = ks.save_compressed(model, tmp_path / "model.ksparse")
    loaded = ks.load_compressed(tmp_path / "model.ksparse")
    assert_same(model, loaded)
    assert loaded.get_layer("conv").granularity == model.get_layer("conv").granularity
    images = np.random.default_rng(0).random((2, 8, 8, 3))
    np.testing.assert_array_equal(model.predict(images, verbose=0), loaded.predict(images, verbose=0))
    assert report["bytes"] == os.path.getsize(tmp_path / "model.ksparse")
    assert report["dense_bytes"] == sum(entry["dense_bytes"] for entry in report["tensors"].values())
    kernel = report["tensors"]["layers/sparse_conv2d/vars/0"]
    assert kernel["bytes"] == ks.storage.nbytes(np.asarray(model.get_layer("conv").kernel)) < kernel["dense_bytes"] / 3
    if dtype == "float32":  # others round kept weights to zero
        mask = report["tensors"]["layers/sparse_conv2d/vars/mask"]
        assert (mask["encoding"], mask["bytes"]) == ("nonzero", 0)


@pytest.mark.parametrize("make", [network, sparse_network], ids=["plain", "sparse"])
def test_counts_are_the_sizes_in_the_file(make, tmp_path):
    model = make()
    kernel = model.get_layer("conv")._kernel
    kernel.assign(np.where(np.random.default_rng(0).random(kernel.shape) < 0.5, 0, kernel))
    counted = ks.count(model)["layers"]
    tensors = ks.save_compressed(model, tmp_path / "model")["tensors"]
    in_file = {"conv": 0, "norm": 0, "dense": 0}
    for path, entry in tensors.items():
        for name, folder in (
            ("conv", "layers/(sparse_)?conv2d/"),
            ("norm", "layers/batch_"),
            ("dense", "layers/(sparse_)?dense/"),
        ):
            in_file[name] += entry["bytes"] if re.match(folder, path) else 0
    assert {name: counted[name]["bytes"]["compressed"] for name in in_file} == in_file


def test_a_mask_that_keeps_zeros_takes_a_bit_a_unit(tmp_path):
    model = sparse_network("weight", 0.5)
    layer = model.get_layer("dense")
    layer._kernel.assign(np.asarray(layer._kernel) * (np.arange(20).reshape(5, 4) % 3 > 0))
    report = ks.save_compressed(model, tmp_path / "model")["tensors"]
    assert report["layers/sparse_dense/vars/mask"]["encoding"] == "Binary()"
    assert report["layers/sparse_dense/vars/mask"]["bytes"] == 3
    assert_same(model, ks.load_compressed(tmp_path / "model"))


def test_a_model_pruned_in_place_and_its_optimizer(tmp_path):
    model = network()
    model.compile(keras.optimizers.Adam(1e-2), "mse", metrics=["mae"])
    pruning = ks.callbacks.GradualPruning(ks.schedules.OneShot(0.8))
    generator = np.random.default_rng(0)
    x, y = generator.random((12, 8, 8, 3), "float32"), generator.random((12, 4), "float32")
    model.fit(x, y, verbose=0, callbacks=[pruning])
    small = ks.save_compressed(model, tmp_path / "small")
    whole = ks.save_compressed(model, tmp_path / "whole", include_optimizer=True)
    assert small["bytes"] < whole["bytes"]
    fresh = ks.load_compressed(tmp_path / "small")
    assert_same(model, fresh)
    assert fresh.compiled and isinstance(fresh.optimizer, keras.optimizers.Adam)
    assert int(fresh.optimizer.iterations) == 0
    assert float(fresh.optimizer.learning_rate) == pytest.approx(1e-2)
    assert set(fresh.evaluate(x, y, verbose=0, return_dict=True)) == {"loss", "mae"}
    assert not ks.load_compressed(tmp_path / "small", compile=False).compiled
    resumed = ks.load_compressed(tmp_path / "whole")
    for one, other in zip(model.optimizer.variables, resumed.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    train(model), train(resumed)
    assert_same(model, resumed)


@keras.saving.register_keras_serializable(package="models_test")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = ks.layers.SparseDense(6, granularity="weight")
        self.outputs_ = keras.layers.Dense(2)

    def call(self, x):
        return self.outputs_(self.hidden(x))


class Unregistered(keras.layers.Dense):
    pass


def test_models_of_ones_own(tmp_path):
    model = Subclassed()
    model(np.ones((1, 3)))
    model.hidden.assign_mask(np.eye(3, 6))
    ks.save_compressed(model, tmp_path / "model")
    assert_same(model, ks.load_compressed(tmp_path / "model"))
    model = keras.Sequential([keras.Input((3,)), Unregistered(2)])
    ks.save_compressed(model, tmp_path / "model")
    assert_same(model, ks.load_compressed(tmp_path / "model", custom_objects={"Unregistered": Unregistered}))
    with pytest.raises(TypeError, match="Unregistered"):
        ks.load_compressed(tmp_path / "model")


def test_assets_are_kept(tmp_path):
    lookup = keras.layers.TextVectorization(output_sequence_length=3)
    lookup.adapt(["a sparse model", "a mask"])
    model = keras.Sequential([keras.Input((), dtype="string"), lookup, keras.layers.Embedding(9, 2)])
    ks.save_compressed(model, tmp_path / "model")
    loaded = ks.load_compressed(tmp_path / "model")
    assert loaded.layers[0].get_vocabulary() == lookup.get_vocabulary()
    assert_same(model, loaded)


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model"
    ks.save_compressed(network(), path)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ks.save_compressed(sparse_network(), path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file whose tensors take every encoding, and its bytes."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((40,))] + [keras.layers.Dense(40, name=f"d{i}") for i in range(3)])
    model = ks.sparsify(model, "weight")
    for layer, sparsity in zip(model.layers, (0.0, 0.5, 0.9)):
        layer.assign_mask(np.asarray(RandomMask(sparsity)(layer.mask.shape)) if sparsity else np.ones((40, 40)))
    model.layers[1]._kernel.assign(np.asarray(model.layers[1]._kernel) * (np.arange(40) % 2))
    path = tmp_path_factory.mktemp("storage") / "model"
    report = ks.save_compressed(model, path)
    used = {entry["encoding"].split("(")[0] for entry in report["tensors"].values()}
    assert used == {"Dense", "BitMask", "CSR", "Binary", "nonzero"}
    return path, path.read_bytes()


def test_every_truncation_is_noticed(written, tmp_path):
    _, content = written
    path = tmp_path / "cut"
    lengths = {*range(80), *range(80, len(content), 97), *range(len(content) - 40, len(content))}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="`path` must be"):
            ks.load_compressed(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="truncated or corrupted"):
        ks.load_compressed(path)


def test_every_flipped_bit_is_noticed(written, tmp_path):
    _, content = written
    path = tmp_path / "flipped"
    generator = np.random.default_rng(0)
    places = {*range(64), *generator.integers(64, len(content), 400), *range(len(content) - 32, len(content))}
    for place in places:
        broken = bytearray(content)
        broken[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="`path` must be"):
            ks.load_compressed(path)


def signed(directory, payload):
    """A file with a right checksum, whatever it holds."""
    directory = json.dumps(directory).encode() if isinstance(directory, dict) else directory
    size = models._HEAD.size + len(directory) + len(payload) + 32
    content = models._HEAD.pack(models.MAGIC, models.VERSION, 0, size, len(directory)) + directory + payload
    return content + hashlib.sha256(content).digest()


def unsigned(content):
    directory_bytes = models._HEAD.unpack_from(content)[-1]
    start = models._HEAD.size + directory_bytes
    return content[models._HEAD.size : start], content[start:-32]


def test_what_a_right_checksum_does_not_cover(written, tmp_path):
    """Random changes with the checksum made right again: an error, or a model's worth of tensors; never a crash."""
    _, content = written
    directory, payload = unsigned(content)
    generator = np.random.default_rng(1)
    refused = 0
    path = tmp_path / "changed"
    tracemalloc.start()
    for _ in range(400):
        changed = bytearray(directory)
        for _ in range(generator.integers(1, 4)):
            place = generator.integers(len(changed))
            changed[place] = generator.choice(list(b'0123456789",:[]{}e-. nx')) if generator.random() < 0.8 else 0
        path.write_bytes(signed(bytes(changed), payload))
        try:
            models._read(os.fspath(path))
        except ValueError as error:
            assert "`path` must hold a directory that fits" in str(error)
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 200
    assert peak < 10_000_000


HUGE = 10**15


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [HUGE]},
        {"shape": [2**62, 2**62]},
        {"shape": [-1, 40]},
        {"shape": [1.5]},
        {"shape": "40"},
        {"shape": [1] * 70},
        {"parts": [HUGE]},
        {"parts": [-4]},
        {"parts": []},
        {"parts": None},
        {"dtype": "object"},
        {"dtype": "S100"},
        {"dtype": None},
        {"path": 3},
        {"encoding": {"encoding": "pickle"}},
        {"encoding": {"encoding": "csr", "index_bits": 64}},
        {"encoding": {"encoding": "bitmask", "block_shape": [HUGE]}, "parts": [1, 0]},
        {"encoding": {"encoding": "bitmask", "block_shape": [HUGE, HUGE]}, "shape": [0, HUGE], "parts": [0, 0]},
        {"encoding": {"encoding": "block_csr", "block_shape": [1, HUGE]}, "parts": [1, 0, 0]},
        {"encoding": {"encoding": "nonzero", "of": 99}, "parts": []},
        {"encoding": {"encoding": "nonzero", "of": 0}, "parts": []},
        {"encoding": "dense"},
        {"attributes": 3},
    ],
    ids=str,
)
def test_lengths_in_a_file_are_not_trusted(change, written, tmp_path):
    _, content = written
    directory, payload = unsigned(content)
    directory = json.loads(directory)
    directory["tensors"][0] = {**directory["tensors"][0], **change}
    path = tmp_path / "changed"
    path.write_bytes(signed(directory, payload))
    tracemalloc.start()
    with pytest.raises(ValueError, match="`path` must hold a directory that fits its contents. Received: path="):
        ks.load_compressed(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        ({"name": "config.json", "bytes": HUGE}, "bytes"),
        ({"name": "config.json", "bytes": 3}, "bytes"),
        ({"name": "/etc/passwd"}, "no name of a member"),
        ({"name": "assets/../../x"}, "no name of a member"),
        ({"name": "model.weights.h5"}, "no name of a member"),
        ({"name": "config.json", "stored": HUGE}, "that are left"),
    ],
    ids=str,
)
def test_members_are_not_trusted(member, problem, written, tmp_path):
    directory, payload = unsigned(written[1])
    directory = json.loads(directory)
    place = next(i for i, entry in enumerate(directory["members"]) if entry["name"] == "config.json")
    directory["members"][place] |= member
    path = tmp_path / "changed"
    path.write_bytes(signed(directory, payload))
    with pytest.raises(ValueError, match=problem):
        ks.load_compressed(path)


def test_other_files_and_versions(written, tmp_path):
    path = tmp_path / "model"
    network().save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="a file that ks.save_compressed wrote"):
        ks.load_compressed(tmp_path / "model.keras")
    content = bytearray(written[1])
    content[8] = 2
    path.write_bytes(content[:-32] + hashlib.sha256(content[:-32]).digest())
    with pytest.raises(ValueError, match="be a file of version 1. Received: .* of version 2"):
        ks.load_compressed(path)
    with pytest.raises(FileNotFoundError):
        ks.load_compressed(tmp_path / "none")


def test_lambdas_need_safe_mode_off(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x * 2)])
    ks.save_compressed(model, tmp_path / "model")
    with pytest.raises(ValueError, match="safe_mode"):
        ks.load_compressed(tmp_path / "model")
    loaded = ks.load_compressed(tmp_path / "model", safe_mode=False)
    np.testing.assert_array_equal(loaded(np.ones((1, 3))), [[2, 2, 2]])
