"""Encodings of a tensor with zeros, and their exact sizes.

| encoding   | what is stored                                                     | overhead over the values        |
|------------|--------------------------------------------------------------------|---------------------------------|
| `Dense`    | every value                                                        | none, and the zeros             |
| `BitMask`  | one bit a block, the values of the blocks that hold any            | 1 bit a block                   |
| `CSR`      | the nonzero values, each with the number of zeros before it        | 4 to 8 bits a value, and fillers |
| `BlockCSR` | the values of blocks that hold any, their columns, a pointer a row | a column a block, a pointer a row |
| `Binary`   | one bit a value of a tensor of zeros and ones                      | -                               |

`BitMask` and `CSR` are those of Zhu & Gupta (2017), section 5. All take the tensor in row-major order, store numbers
in little-endian byte order, and give back an equal tensor; a negative zero comes back as zero from all but `Dense`.
"""

import dataclasses
import math

import ml_dtypes
import numpy as np

from keras_sparse import granularity, validation
from keras_sparse.storage import bits

__all__ = [
    "CSR",
    "BitMask",
    "Binary",
    "BlockCSR",
    "Dense",
    "EncodedTensor",
    "Encoding",
    "candidates",
    "encode",
    "get",
    "nbytes",
    "smallest",
]

# `smallest` makes nothing more than so many times smaller, or below so many bytes: see `may_decode_to`.
MAX_EXPANSION, _ALWAYS = 256, 4096

# The names that stand in files, in the byte order of the files.
_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float32", "float16", "float64", "bool", "complex64", "complex128")
    + tuple(f"{sign}int{size}" for sign in ("", "u") for size in (8, 16, 32, 64))
}
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class EncodedTensor:
    """A tensor as it is stored.

    Attributes:
        encoding: The `Encoding`.
        shape: Shape of the tensor.
        dtype: Name of its type, as `"bfloat16"`.
        parts: Tuple of byte arrays (NumPy, `uint8`); what they hold is the encoding's matter.
    """

    encoding: "Encoding"
    shape: tuple
    dtype: str
    parts: tuple

    @property
    def nbytes(self):
        """Number of bytes of all parts together."""
        return sum(part.size for part in self.parts)

    def decode(self):
        """Return the tensor as a NumPy array.

        Raises:
            ValueError: If the parts are not what the encoding makes of a tensor of this shape.
        """
        return self.encoding.decode(self.parts, self.shape, dtype_of(self.dtype))


class Encoding:
    """Base of all encodings. A subclass defines `nbytes`, `parts` and `decode`."""

    def nbytes(self, kept, itemsize):
        """Return the exact size in bytes of a tensor's encoding, without making it.

        Args:
            kept: Boolean array of the tensor's shape, true where it is not zero.
            itemsize: Bytes of one value.
        """
        raise NotImplementedError

    def parts(self, array):
        """Return the parts of `array`, as a list of NumPy arrays."""
        raise NotImplementedError

    def decode(self, parts, shape, dtype):
        """Return the array of which `parts` are the parts; see `EncodedTensor.decode`."""
        raise NotImplementedError

    def decoded_values(self, shape):
        """Return how many values `decode` makes of a tensor of `shape`, fillers of blocks included."""
        return math.prod(shape)

    def get_config(self):
        return {}

    def _check_count(self, parts, count):
        if len(parts) != count:
            raise ValueError(f"{type(self).__name__} has {count} parts, not {len(parts)}")

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash((type(self).__name__, str(self.get_config())))

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.get_config().items())})"


class Dense(Encoding):
    r"""Every value, zeros included: \(n b\) bytes for \(n\) values of \(b\) bytes."""

    def nbytes(self, kept, itemsize):
        return kept.size * itemsize

    def parts(self, array):
        return [array]

    def decode(self, parts, shape, dtype):
        self._check_count(parts, 1)
        return _values(parts[0], math.prod(shape), dtype).reshape(shape)


class Binary(Encoding):
    r"""A tensor of zeros and ones, as masks are, one bit a value: \(\lceil n / 8 \rceil\) bytes for \(n\) values."""

    def nbytes(self, kept, itemsize):
        return bits.packed_bytes(kept.size, 1)

    def parts(self, array):
        if not is_binary(array):
            validation.fail("array", "hold zeros and ones only", array[(array != 0) & (array != 1)].ravel()[0].item())
        return [np.packbits(array.ravel() != 0, bitorder="little")]

    def decode(self, parts, shape, dtype):
        self._check_count(parts, 1)
        return bits.unpack(parts[0], math.prod(shape), 1).astype(dtype).reshape(shape)


class BitMask(Encoding):
    r"""One bit for each value or block of values, and the values where the bit is set.

    $$\lceil n / 8 \rceil + m\,b \text{ bytes}$$

    for \(n\) values, \(m\) of them nonzero, of \(b\) bytes each; of blocks, \(n\) is their number and \(m\) the number
    of values of those that hold any nonzero one (Zhu & Gupta, 2017, section 5).

    Args:
        block_shape: Shape of the blocks, along the last axes of the tensor; `None` for single values. Where it
            does not divide the tensor, the last blocks are filled up with zeros, which are stored.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(self, block_shape=None):
        self.block_shape = None if block_shape is None else _check_block_shape(block_shape)

    def nbytes(self, kept, itemsize):
        blocks = _Blocks(kept.shape, self.block_shape)
        held = int(np.count_nonzero(blocks.of(kept).any(axis=1)))
        return bits.packed_bytes(blocks.count, 1) + held * blocks.size * itemsize

    def parts(self, array):
        values = _Blocks(array.shape, self.block_shape).of(array)
        held = (values != 0).any(axis=1)
        return [np.packbits(held, bitorder="little"), values[held]]

    def decode(self, parts, shape, dtype):
        self._check_count(parts, 2)
        blocks = _Blocks(shape, self.block_shape)
        held = bits.unpack(parts[0], blocks.count, 1).astype(bool)
        stored = _values(parts[1], int(np.count_nonzero(held)) * blocks.size, dtype)
        values = np.zeros((blocks.count, blocks.size), dtype)
        values[held] = stored.reshape(-1, blocks.size)
        return blocks.tensor(values)

    def decoded_values(self, shape):
        blocks = _Blocks(shape, self.block_shape)
        return blocks.count * blocks.size

    def get_config(self):
        return {"block_shape": self.block_shape}


class CSR(Encoding):
    r"""The nonzero values, each with the number of zeros before it: CSR with relative indices.

    $$m\,b + \lceil m\,w / 8 \rceil \text{ bytes}, \quad m = \sum_i \left(1 + \lfloor g_i / 2^w \rfloor\right)$$

    for values of \(b\) bytes, indices of \(w\) bits and \(g_i\) zeros before the i-th nonzero value. An index counts
    \(2^w - 1\) zeros at most: in a longer gap every \(2^w\)-th zero is stored as a value, a filler. Zeros behind the
    last value are not stored, nor is where rows end, since rows follow each other (Zhu & Gupta, 2017, section 5,
    after Parashar et al., 2017).

    Args:
        index_bits: Bits of an index, from 1 to 8. The papers take 4 or 5; more save fillers at high sparsities.

    Raises:
        ValueError: If `index_bits` is outside its range.
    """

    def __init__(self, index_bits=4):
        self.index_bits = validation.integer("index_bits", index_bits, at_least=1)
        if self.index_bits > 8:
            validation.fail("index_bits", "be at most 8", index_bits)

    def nbytes(self, kept, itemsize):
        _, gaps = _gaps(kept)
        entries = gaps.size + int((gaps >> self.index_bits).sum())
        return entries * itemsize + bits.packed_bytes(entries, self.index_bits)

    def parts(self, array):
        places, gaps = _gaps(array != 0)
        fillers = gaps >> self.index_bits
        last = np.cumsum(fillers + 1) - 1  # the entries that hold the nonzero values; fillers stand before them
        counts = np.full(places.size + int(fillers.sum()), 2**self.index_bits - 1, "uint8")
        counts[last] = gaps & (2**self.index_bits - 1)
        values = np.zeros(counts.size, array.dtype)
        values[last] = array.ravel()[places]
        return [bits.pack(counts, self.index_bits), values]

    def decode(self, parts, shape, dtype):
        self._check_count(parts, 2)
        entries, rest = divmod(parts[1].size, dtype.itemsize)
        if rest:
            raise ValueError(f"{parts[1].size} bytes are no whole number of values of {dtype.itemsize} bytes")
        places = np.cumsum(bits.unpack(parts[0], entries, self.index_bits).astype("int64") + 1) - 1
        if entries and places[-1] >= math.prod(shape):
            raise ValueError(f"value number {places[-1]} lies outside a tensor of {math.prod(shape)} values")
        array = np.zeros(math.prod(shape), dtype)
        array[places] = _values(parts[1], entries, dtype)
        return array.reshape(shape)

    def get_config(self):
        return {"index_bits": self.index_bits}


class BlockCSR(Encoding):
    r"""The values of blocks that hold any nonzero one, in rows of blocks: block CSR (BSR).

    $$(r + 1)\,p + k\,c + k\,s\,b \text{ bytes}$$

    for \(r\) rows of blocks, a pointer of \(p\) bytes each to where its blocks begin, and \(k\) blocks kept with a
    column of \(c\) bytes and \(s\) values of \(b\) bytes. \(p\) and \(c\), 1, 2, 4 or 8, are as small as the
    number of blocks of the tensor, and of a row, allows. A row runs along the last axis of the tensor; rows follow
    each other in row-major order. A matrix that its blocks divide is what `scipy.sparse.bsr_array` holds.

    Args:
        block_shape: Shape of the blocks, along the last axes of the tensor. Where it does not divide the tensor, the
            last blocks are filled up with zeros, which are stored.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(self, block_shape=(1, 1)):
        self.block_shape = _check_block_shape(block_shape)

    def nbytes(self, kept, itemsize):
        blocks = _Blocks(kept.shape, self.block_shape)
        held = int(np.count_nonzero(blocks.of(kept).any(axis=1)))
        pointer, column = _index_types(blocks)
        return (blocks.rows + 1) * pointer.itemsize + held * (column.itemsize + blocks.size * itemsize)

    def parts(self, array):
        blocks = _Blocks(array.shape, self.block_shape)
        values = blocks.of(array)
        held = (values != 0).any(axis=1)
        pointer, column = _index_types(blocks)
        in_rows = held.reshape(blocks.rows, blocks.columns)
        pointers = np.concatenate([[0], np.cumsum(np.count_nonzero(in_rows, axis=1))])
        return [pointers.astype(pointer), np.nonzero(in_rows)[1].astype(column), values[held]]

    def decode(self, parts, shape, dtype):
        self._check_count(parts, 3)
        blocks = _Blocks(shape, self.block_shape)
        pointer, column = _index_types(blocks)
        pointers = _values(parts[0], blocks.rows + 1, pointer).astype("int64")
        held = int(pointers[-1])
        columns = _values(parts[1], held, column).astype("int64")
        if pointers[0] != 0 or (np.diff(pointers) < 0).any() or (columns >= blocks.columns).any():
            raise ValueError("pointers fall, or a column lies outside its row")
        places = np.repeat(np.arange(blocks.rows), np.diff(pointers)) * blocks.columns + columns
        if (np.diff(places) <= 0).any():
            raise ValueError("the columns of a row do not rise")
        values = np.zeros((blocks.count, blocks.size), dtype)
        values[places] = _values(parts[2], held * blocks.size, dtype).reshape(held, blocks.size)
        return blocks.tensor(values)

    def decoded_values(self, shape):
        blocks = _Blocks(shape, self.block_shape)
        return blocks.count * blocks.size

    def get_config(self):
        return {"block_shape": self.block_shape}


class _Blocks:
    """A tensor cut into blocks along its last axes, filled up with zeros where they do not divide it."""

    def __init__(self, shape, block_shape):
        self.shape = tuple(shape)
        block = (1,) * len(self.shape) if block_shape is None else tuple(block_shape)
        if len(block) > len(self.shape):
            validation.fail("block_shape", f"have at most as many sizes as the tensor's shape, {self.shape}", block)
        self.block = (1,) * (len(self.shape) - len(block)) + block
        self.grid = tuple(-(-size // part) for size, part in zip(self.shape, self.block))
        self.size = math.prod(self.block)
        self.count = math.prod(self.grid)
        self.columns = self.grid[-1] if self.grid else 1
        self.rows = self.count // self.columns if self.columns else 0

    def of(self, array):
        """Return the blocks as rows of a matrix, in row-major order of the grid."""
        if self.size == 1:
            return array.reshape(-1, 1)
        filler = [(0, parts * part - size) for parts, part, size in zip(self.grid, self.block, self.shape)]
        cut = np.pad(array, filler).reshape([n for pair in zip(self.grid, self.block) for n in pair])
        rank = len(self.shape)
        return cut.transpose([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]).reshape(self.count, self.size)

    def tensor(self, values):
        """Return the tensor whose blocks are the rows of `values`."""
        if self.size == 1:
            return values.reshape(self.shape)
        rank = len(self.shape)
        cut = values.reshape(self.grid + self.block).transpose(
            [axis + half for axis in range(rank) for half in (0, rank)]
        )
        whole = cut.reshape([parts * part for parts, part in zip(self.grid, self.block)])
        return np.ascontiguousarray(whole[tuple(slice(size) for size in self.shape)])


def _gaps(kept):
    """Return where a tensor is not zero, and the number of zeros before each of these places."""
    places = np.flatnonzero(kept)
    return places, np.diff(places, prepend=-1) - 1


def _index_types(blocks):
    """Return the types of a row's pointer and of a block's column."""
    return _unsigned(blocks.count), _unsigned(max(blocks.columns - 1, 0))


def _unsigned(largest):
    return next(np.dtype(f"<u{size}") for size in (1, 2, 4, 8) if largest < 256**size)


def _values(data, count, dtype):
    if data.size != count * dtype.itemsize:
        raise ValueError(
            f"{count} values of {dtype.itemsize} bytes take {count * dtype.itemsize} bytes, not {data.size}"
        )
    return np.frombuffer(data.tobytes(), dtype)


def _check_block_shape(block_shape):
    if not isinstance(block_shape, (list, tuple)) or not block_shape:
        validation.fail("block_shape", "be a list of sizes", block_shape, TypeError)
    return tuple(validation.integer("block_shape", size, at_least=1) for size in block_shape)


def dtype_of(name):
    """Return the NumPy type of a name in a file, in the byte order of files."""
    return _DTYPES[validation.one_of("dtype", name, tuple(_DTYPES))]


_ENCODINGS = {"dense": Dense, "bitmask": BitMask, "csr": CSR, "block_csr": BlockCSR, "binary": Binary}


def get(identifier):
    """Return an `Encoding` from itself, its name, or a dict of its name, as `"encoding"`, and its arguments.

    The names are `"dense"`, `"bitmask"`, `"csr"`, `"block_csr"` and `"binary"`.
    """
    if isinstance(identifier, Encoding):
        return identifier
    if isinstance(identifier, str):
        return _ENCODINGS[validation.one_of("encoding", identifier, tuple(_ENCODINGS))]()
    if not isinstance(identifier, dict) or not isinstance(identifier.get("encoding"), str):
        validation.fail("encoding", "be a name or a keras_sparse.storage.Encoding", identifier, TypeError)
    cls = _ENCODINGS[validation.one_of("encoding", identifier["encoding"], tuple(_ENCODINGS))]
    config = {key: value for key, value in identifier.items() if key != "encoding"}
    if set(config) != set(cls().get_config()):
        validation.fail("encoding", f"have the arguments {sorted(cls().get_config())}", identifier)
    return cls(**config)


def serialize(encoding):
    """Return the dict of which `get` makes the encoding again."""
    name = next(name for name, cls in _ENCODINGS.items() if cls is type(encoding))
    return {"encoding": name, **encoding.get_config()}


def encode(array, encoding="smallest"):
    """Encode a tensor.

    Args:
        array: NumPy array, or what NumPy makes one of, of float32, float16, bfloat16 or another numeric type.
        encoding: An `Encoding`, its name, or `"smallest"` for the smallest of `ks.storage.candidates`.

    Returns:
        An `EncodedTensor`; its `decode()` gives back an equal array.

    Raises:
        ValueError: If the name is unknown, or there is no encoding for the array's type.
    """
    array = np.asarray(array)
    name = array.dtype.name
    if name not in _DTYPES:
        validation.fail("array", f"be of one of the types {', '.join(_DTYPES)}", name)
    encoding = smallest(array) if isinstance(encoding, str) and encoding == "smallest" else get(encoding)
    parts = tuple(_as_bytes(part) for part in encoding.parts(array))
    return EncodedTensor(encoding, array.shape, name, parts)


def _as_bytes(part):
    little = part.astype(part.dtype.newbyteorder("<"), copy=False)
    return np.frombuffer(np.ascontiguousarray(little).tobytes(), "uint8")


def nbytes(array, encoding="smallest"):
    """Return the exact size in bytes of `encode(array, encoding)`, without encoding.

    Args:
        array: NumPy array.
        encoding: As in `encode`.
    """
    array = np.asarray(array)
    encoding = smallest(array) if isinstance(encoding, str) and encoding == "smallest" else get(encoding)
    return encoding.nbytes(array != 0, array.dtype.itemsize)


def candidates(array):
    """Return the encodings that may suit a tensor: what `"smallest"` chooses among.

    These are `Dense`, `BitMask` of single values, `CSR` of 4 to 8 bits; for tensors of rank 2 and more, `BitMask`
    and `BlockCSR` of what each granularity removes together; and `Binary` where there are zeros and ones only.
    """
    array = np.asarray(array)
    found = [Dense(), BitMask(), *(CSR(width) for width in range(4, 9))]
    blocks = {}
    if array.ndim >= 2 and array.size:
        for name in granularity.names():
            units = granularity.get(name).mask_shape(array.shape)
            blocks[tuple(size // count for size, count in zip(array.shape, units))] = None
    found += [cls(block) for block in blocks if math.prod(block) > 1 for cls in (BitMask, BlockCSR)]
    return found + ([Binary()] if is_binary(array) else [])


def smallest(array):
    """Return the encoding of `candidates` that takes the fewest bytes for `array`; the first of equal ones.

    Nothing is made more than 256 times smaller, so that whoever reads an encoded tensor knows from its bytes how
    large it may become.
    """
    array = np.asarray(array)
    kept = array != 0
    sizes = [(encoding.nbytes(kept, array.dtype.itemsize), encoding) for encoding in candidates(array)]
    sizes = [pair for pair in sizes if may_decode_to(array.nbytes, pair[0])]
    return min(sizes, key=lambda pair: pair[0])[1]


def may_decode_to(decoded, stored):
    """Return whether a tensor of `decoded` bytes may be stored in `stored` bytes."""
    return decoded <= max(MAX_EXPANSION * stored, _ALWAYS)


def is_binary(array):
    """Return whether an array holds zeros and ones only."""
    return bool(((array == 0) | (array == 1)).all())
