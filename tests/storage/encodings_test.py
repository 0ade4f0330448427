import json
import math

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse

import keras_sparse as ks
from keras_sparse import storage
from keras_sparse.storage import encodings

DTYPES = ("float32", "float16", ml_dtypes.bfloat16, "float64", "int8", "bool")
SHAPES = ((), (0,), (1,), (37,), (3, 0, 2), (13, 11), (3, 5, 7, 9), (2, 3, 3, 2, 2))
SPARSITIES = (0.0, 0.5, 0.9, 0.99, 1.0)


def sparse_array(shape, sparsity, dtype="float32", seed=0):
    generator = np.random.default_rng(seed)
    return np.asarray(generator.normal(0, 30, shape) * (generator.random(shape) >= sparsity)).astype(dtype)


def encodings_for(array):
    yield from (storage.Dense(), storage.BitMask(), *(storage.CSR(width) for width in (1, 4, 5, 8)))
    if array.ndim:
        yield from (storage.BitMask((4,)), storage.BlockCSR((5,)))
    if array.ndim >= 2:
        yield from (storage.BitMask((2, 3)), storage.BlockCSR((1, 1)), storage.BlockCSR((3, 2)))
    if array.dtype == bool:
        yield storage.Binary()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_encodings_give_back_the_tensor_and_know_its_size(shape, dtype):
    for sparsity in SPARSITIES:
        array = sparse_array(shape, sparsity, dtype)
        for encoding in encodings_for(array):
            encoded = storage.encode(array, encoding)
            decoded = encoded.decode()
            assert decoded.dtype == array.dtype and decoded.shape == array.shape
            np.testing.assert_array_equal(decoded, array, err_msg=str(encoding))
            assert encoded.nbytes == storage.nbytes(array, encoding), (encoding, sparsity)


def walk(array, width):
    """CSR with relative indices, value by value."""
    counts, values, zeros = [], [], 0
    for value in array.ravel():
        if value == 0 and zeros < 2**width - 1:
            zeros += 1
            continue
        counts.append(zeros)
        values.append(value)
        zeros = 0
    while values and values[-1] == 0:  # fillers behind the last value
        counts.pop(), values.pop()
    return counts, values


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_csr_is_a_walk_over_the_tensor(width, sparsity):
    array = sparse_array((3, 3, 17, 13), sparsity, seed=1) + np.float32(0)  # no negative zeros
    counts, values = walk(array, width)
    indices, stored = storage.encode(array, storage.CSR(width)).parts
    assert stored.tobytes() == np.array(values, "<f4").tobytes()
    whole = sum(count << (width * place) for place, count in enumerate(counts))
    assert indices.tobytes() == whole.to_bytes(math.ceil(width * len(counts) / 8), "little")


def test_bytes_of_small_tensors():
    array = np.array([[0, 1.5, 0, 0], [0, 0, 0, -2]], "float32")
    values = np.array([1.5, -2], "<f4").tobytes()
    parts = {name: [p.tobytes() for p in storage.encode(array, name).parts] for name in ("bitmask", "csr")}
    assert parts["bitmask"] == [bytes([0b10000010]), values]
    assert parts["csr"] == [bytes([0x51]), values]  # one zero before the first, five before the second
    assert storage.encode(array, storage.BlockCSR((1, 2))).parts[0].tobytes() == bytes([0, 1, 2])
    far = np.zeros(40, "float32")
    far[[16, 39]] = 3, 4  # gaps of 16 and 22 zeros: with 4 bits a filler stands for 16 of each
    indices, values = storage.encode(far, storage.CSR(4)).parts
    assert indices.tobytes() == bytes([0x0F, 0x6F])
    np.testing.assert_array_equal(np.frombuffer(values.tobytes(), "<f4"), [0, 3, 0, 4])
    assert storage.nbytes(far, storage.CSR(5)) == 2 * 4 + 2


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_block_csr_is_scipys(sparsity):
    array = sparse_array((12, 35), 0.0) * np.kron(sparse_array((4, 7), sparsity, "bool"), np.ones((3, 5)))
    array = array.astype("float32")
    expected = scipy.sparse.bsr_array(array, blocksize=(3, 5))
    expected.sort_indices()
    pointers, columns, values = storage.encode(array, storage.BlockCSR((3, 5))).parts
    np.testing.assert_array_equal(pointers, expected.indptr)
    np.testing.assert_array_equal(columns, expected.indices)
    np.testing.assert_array_equal(np.frombuffer(values.tobytes(), "<f4"), expected.data.ravel())


def test_index_types_grow_with_the_tensor():
    wide = np.zeros((3, 300), "float32")
    wide[1, 299] = 1
    assert [part.size for part in storage.encode(wide, storage.BlockCSR((1, 1))).parts] == [4 * 2, 2, 4]
    np.testing.assert_array_equal(storage.encode(wide, storage.BlockCSR((1, 1))).decode(), wide)


def test_values_that_are_no_numbers_and_zeros_of_either_sign():
    array = np.array([np.nan, -0.0, np.inf, 0.0, -np.inf, 1e-45], "float32")
    for name in ("bitmask", "csr", "dense"):
        decoded = storage.encode(array, name).decode()
        np.testing.assert_array_equal(decoded, array)
        assert np.signbit(decoded[1]) == (name == "dense")
    assert storage.nbytes(array, "bitmask") == 1 + 4 * 4  # neither zero is stored


def test_big_endian_and_strided_arrays():
    array = sparse_array((6, 10), 0.5)
    for other in (array.astype(">f4"), np.asfortranarray(array), np.repeat(array, 2, axis=1)[:, ::2]):
        for name in ("dense", "bitmask", "csr"):
            encoded = storage.encode(other, name)
            assert [p.tobytes() for p in encoded.parts] == [p.tobytes() for p in storage.encode(array, name).parts]
            np.testing.assert_array_equal(encoded.decode(), array)


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_smallest_is_the_smallest(sparsity):
    array = sparse_array((64, 101), sparsity)
    sizes = {encoding: storage.nbytes(array, encoding) for encoding in storage.candidates(array)}
    assert storage.encode(array).nbytes == storage.nbytes(array) == min(sizes.values())
    expected = {0.0: storage.Dense(), 0.5: storage.BitMask(), 0.9: storage.CSR(6), 0.99: storage.CSR(8)}
    if sparsity in expected:
        assert storage.smallest(array) == expected[sparsity]


@pytest.mark.parametrize("granularity", ["connection", "group", "feature_map", "channel"])
def test_blocks_of_the_granularities_are_found(granularity):
    kernel = sparse_array((3, 3, 32, 48), 0.0)
    units = ks.granularity.get(granularity).mask_shape(kernel.shape)
    kernel *= np.random.default_rng(0).random(units) >= 0.9
    chosen = storage.smallest(kernel)
    assert isinstance(chosen, (storage.BitMask, storage.BlockCSR)) and math.prod(chosen.block_shape) > 1
    kept = np.count_nonzero(kernel) * 4
    assert kept < storage.nbytes(kernel) <= kept + math.prod(units) * 2
    assert storage.nbytes(kernel) < storage.nbytes(kernel, storage.CSR(5))


def test_masks_take_a_bit_a_value():
    mask = sparse_array((1, 1, 9, 7), 0.5, "bool").astype("float32")
    assert storage.smallest(mask) == storage.Binary() and storage.nbytes(mask) == 8
    np.testing.assert_array_equal(storage.encode(mask).decode(), mask)


def test_nothing_is_made_more_than_256_times_smaller():
    kernel = np.zeros((3, 3, 64, 128), "float32")
    assert storage.nbytes(kernel) * 256 >= kernel.nbytes
    assert storage.nbytes(kernel, storage.CSR(4)) == 0  # where it is asked for


def test_encodings_from_names_and_configs():
    for encoding in (
        storage.Dense(),
        storage.BitMask((2, 2)),
        storage.CSR(5),
        storage.BlockCSR((3,)),
        storage.Binary(),
    ):
        assert storage.get(encoding) is encoding
        again = storage.get(json.loads(json.dumps(encodings.serialize(encoding))))
        assert again == encoding and hash(again) == hash(encoding) and repr(again) == repr(encoding)
    assert storage.get("csr") == storage.CSR(4) != storage.CSR(5)


@pytest.mark.parametrize(
    ("encoding", "change", "message"),
    [
        (storage.Dense(), lambda p: [p[0][:-1]], "take 480 bytes, not 479"),
        (storage.Dense(), lambda p: [], "Dense has 1 parts, not 0"),
        (storage.BitMask(), lambda p: [p[0], p[1][:-4]], "values of 4 bytes take"),
        (storage.BitMask(), lambda p: [p[0][:-1], p[1]], "120 integers of 1 bits take 15 bytes, not 14"),
        (
            storage.CSR(4),
            lambda p: [np.append(p[0][:-1] | np.uint8(0xFF), p[0][-1]), p[1]],
            "lies outside a tensor of 120 values",
        ),
        (storage.CSR(4), lambda p: [p[0], p[1][:-1]], "no whole number"),
        (storage.BlockCSR((1, 1)), lambda p: [p[0][::-1], p[1], p[2]], "values of 1 bytes take 0 bytes"),
        (storage.BlockCSR((1, 1)), lambda p: [p[0], p[1] + np.uint8(10), p[2]], "a column lies outside its row"),
        (storage.BlockCSR((1, 1)), lambda p: [p[0], p[1] * np.uint8(0), p[2]], "do not rise"),
    ],
    ids=lambda value: repr(value) if isinstance(value, storage.Encoding) else None,
)
def test_parts_that_do_not_fit(encoding, change, message):
    encoded = storage.encode(sparse_array((12, 10), 0.5), encoding)
    broken = storage.EncodedTensor(encoding, encoded.shape, encoded.dtype, tuple(change(list(encoded.parts))))
    with pytest.raises(ValueError, match=message):
        broken.decode()
