"""Whole Keras models in one file, each tensor in its smallest encoding. docs/storage.md has the format."""

import hashlib
import io
import json
import os
import pathlib
import struct
import tempfile
import warnings
import zipfile
import zlib

import h5py
import keras
import ml_dtypes
import numpy as np

from keras_sparse import files, validation
from keras_sparse.storage import encodings

__all__ = ["compressed_bytes", "load_compressed", "plan", "save_compressed"]

# As PNG's, the bytes behind the name tell a file that was sent as text from a whole one.
MAGIC = b"\x89KSPRS\r\n"
VERSION = 1
_HEAD = struct.Struct("<8sHHQQ")  # magic, version, zero, bytes of the file, bytes of the directory
_DIGEST_BYTES = hashlib.sha256().digest_size
_WEIGHTS = "model.weights.h5"  # in a .keras archive
# The encoding of a mask that can be told from its kernel: nothing is stored.
_NONZERO = "nonzero"


def save_compressed(model, path, include_optimizer=False):
    """Save a model in one file in which every tensor takes its smallest encoding.

    A tensor is stored dense, with a bit-mask, as CSR with relative indices of 4 to 8 bits, or in blocks, whichever
    takes the fewest bytes (Zhu & Gupta, 2017, section 5). The mask of a sparse layer takes none where it is
    what the zeros of the kernel say, and one bit a unit elsewhere. All values come back as they are.

    The file holds what a `.keras` file holds: configuration, weights, masks, assets, and how the model is compiled.
    The state of the optimizer, which is dense and larger than the model, is left out unless asked for.

    ```python
    ks.save_compressed(model, "model.ksparse")
    model = ks.load_compressed("model.ksparse")
    ```

    Args:
        model: A built Keras model, sparse, pruned in place or dense; subclassed ones as `model.save` takes them.
        path: File to write. It is written whole or not at all, and replaces one that exists.
        include_optimizer: Whether the optimizer's state is stored too, so that training goes on where it was.

    Returns:
        `{"bytes", "dense_bytes", "tensors"}`: the bytes of the file, what all its tensors take dense, and
        `{path: {"encoding", "bytes", "dense_bytes"}}` of each tensor, the path as in the `.keras` file.

    Raises:
        TypeError: If `model` is no Keras model, or holds a tensor of a type that has no encoding.
        ValueError: If `model` is not built.
        IsADirectoryError: If `path` is a directory.
    """
    if not isinstance(model, keras.Model):
        validation.fail("model", "be a Keras model", model, TypeError)
    if not model.built:
        rule = (
            "be built, so that there are weights to save: give it an `Input` layer or call `model.build(input_shape)`"
        )
        validation.fail("model", rule, model.name)
    path = os.fspath(path)
    if os.path.isdir(path):
        validation.fail("path", "be a file, not a directory", path, IsADirectoryError)
    members, groups, tensors = _read_keras(model, bool(include_optimizer))
    payload, stored_members = [], []
    for name, content in members.items():
        payload.append(zlib.compress(content, 9))
        stored_members.append({"name": name, "bytes": len(content), "stored": len(payload[-1])})
    chosen = _plan_groups({name: array for name, (array, _) in tensors.items()})
    chosen = dict(sorted(chosen.items(), key=lambda item: item[1][0] is None))  # masks behind what tells them
    places = {name: place for place, name in enumerate(chosen)}
    stored_tensors, report = [], {}
    for name, (encoding, of) in chosen.items():
        array, attributes = tensors[name]
        entry = {"path": name, "shape": array.shape, "dtype": array.dtype.name, "attributes": attributes}
        if of is None:
            encoded = encodings.encode(array, encoding)
            entry |= {"encoding": encodings.serialize(encoding), "parts": [part.size for part in encoded.parts]}
            payload += [part.tobytes() for part in encoded.parts]
        else:
            entry |= {"encoding": {"encoding": _NONZERO, "of": places[of]}, "parts": []}
        stored_tensors.append(entry)
        label = _NONZERO if of is not None else repr(encoding)
        report[name] = {"encoding": label, "bytes": sum(entry["parts"]), "dense_bytes": array.nbytes}
    directory = {"members": stored_members, "groups": groups, "tensors": stored_tensors}
    size = _write(path, json.dumps(directory, separators=(",", ":")).encode(), payload)
    dense = sum(entry["dense_bytes"] for entry in report.values())
    return {"bytes": size, "dense_bytes": dense, "tensors": report}


def load_compressed(path, custom_objects=None, compile=True, safe_mode=True):
    """Load a model that `ks.save_compressed` wrote.

    The file is checked, length and checksum, before anything of it is used, and no memory is taken on the word of a
    length in it. It is as trustworthy as whoever wrote it: as in a `.keras` file, the configuration says
    which layers are made.

    Args:
        path: The file.
        custom_objects: Dict of names to the classes and functions that are not registered with Keras.
        compile: Whether the model is compiled as the saved one was. Its optimizer starts afresh where its state was
            left out of the file.
        safe_mode: Whether Python code in the file, of `Lambda` layers, is refused.

    Returns:
        A Keras model.

    Raises:
        FileNotFoundError: If there is no file at `path`.
        ValueError: If the file is no compressed model, of a later version, truncated or corrupted, or Keras refuses
            the model.
    """
    path = os.fspath(path)
    members, groups, tensors = _read(path)
    with tempfile.TemporaryDirectory() as folder:
        archive = os.path.join(folder, "model.keras")
        _write_keras(archive, members, groups, tensors)
        with warnings.catch_warnings():
            # An optimizer without its state is what `include_optimizer=False` is meant to give.
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            return keras.saving.load_model(archive, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)


def plan(arrays):
    """Choose the encodings of tensors that belong together: those of one layer.

    Args:
        arrays: `{name: NumPy array}`, masks included.

    Returns:
        `{name: (encoding, of)}`: the encoding, and `None`; or, of a mask that is what the zeros of another tensor say,
        `None` and the name of that tensor, and no byte is stored.
    """
    of = {}
    for name, array in arrays.items():
        if array.ndim >= 2 and encodings.is_binary(array):
            of[name] = next(
                (other for other in arrays if other not in (name, *of) and _tells(arrays[other], array)), None
            )
            if of[name] is None:
                del of[name]
    return {name: (None, of[name]) if name in of else (encodings.smallest(arrays[name]), None) for name in arrays}


def compressed_bytes(arrays):
    """Return `{name: bytes}` that the tensors of one layer take in a file, exactly, without encoding them.

    Args:
        arrays: `{name: NumPy array}`, masks included.
    """
    chosen = plan(arrays)
    return {name: encodings.nbytes(arrays[name], e) if of is None else 0 for name, (e, of) in chosen.items()}


def _tells(kernel, mask):
    """Return whether the mask is what the zeros of the kernel say."""
    return _nonzero_shape(kernel.shape, mask.shape) and bool(np.array_equal(_nonzero(kernel, mask.shape), mask != 0))


def _nonzero_shape(kernel, mask):
    return len(kernel) == len(mask) and all(m in (1, k) for k, m in zip(kernel, mask))


def _nonzero(kernel, shape):
    axes = tuple(axis for axis, (have, want) in enumerate(zip(kernel.shape, shape)) if have != want)
    return (kernel != 0).any(axis=axes, keepdims=True) if axes else kernel != 0


def _plan_groups(arrays):
    groups = {}
    for name, array in arrays.items():
        groups.setdefault(name.rpartition("/")[0], {})[name] = array
    return {name: entry for group in groups.values() for name, entry in plan(group).items()}


# A .keras file and back: Keras alone knows what belongs to a model's state.


def _read_keras(model, include_optimizer):
    """Return `{name: bytes}` of a .keras archive but the weights, `{path: attributes}` of groups, and the tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            contents = {name: archive.read(name) for name in names}
    groups, tensors = {}, {}

    def visit(name, item):
        if not include_optimizer and name.split("/")[0] == "optimizer":
            return
        attributes = {key: _plain(value, name) for key, value in item.attrs.items()}
        if isinstance(item, h5py.Group):
            groups[name] = attributes
        else:
            tensors[name] = (_array(name, item, attributes), attributes)

    with h5py.File(io.BytesIO(contents.pop(_WEIGHTS)), "r") as weights:
        weights.visititems(visit)
    return contents, groups, tensors


def _array(name, dataset, attributes):
    array = np.asarray(dataset[()])
    if attributes.get("dtype") == "bfloat16":
        array = array.view(ml_dtypes.bfloat16)
    try:
        encodings.dtype_of(array.dtype.name)
    except ValueError:
        validation.fail(
            "model", f"hold tensors of types that have an encoding; '{name}' has none", str(array.dtype), TypeError
        )
    return array


def _plain(value, name):
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, (str, bool, int, float)):
        validation.fail("model", f"have plain attributes in its state; '{name}' has not", value, TypeError)
    return value


def _write_keras(path, members, groups, tensors):
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for name, attributes in groups.items():
            file.require_group(name).attrs.update(attributes)
        for name, (array, attributes) in tensors.items():
            file.create_dataset(name, data=array).attrs.update(attributes)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(_WEIGHTS, weights.getbuffer())


# The file itself.


def _write(path, directory, payload):
    size = _HEAD.size + len(directory) + sum(map(len, payload)) + _DIGEST_BYTES
    digest = hashlib.sha256()
    with files.replacing(path) as staging, open(staging, "wb") as file:
        for piece in (_HEAD.pack(MAGIC, VERSION, 0, size, len(directory)), directory, *payload):
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())
    return size


def _read(path):
    """Return what `_read_keras` does, from a file that is checked first."""
    content = pathlib.Path(path).read_bytes()
    directory_bytes = _check_whole(path, content)
    try:
        return _parse(content, directory_bytes)
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
        OverflowError,
        zlib.error,
    ) as error:
        # Only a file with a right checksum gets here: one written by another program, or to do harm.
        _fail(path, "hold a directory that fits its contents", f"{type(error).__name__}: {error}", error)


def _fail(path, rule, received, cause=None):
    raise ValueError(f"`path` must {rule}. Received: path={path!r}, {received}") from cause


def _check_whole(path, content):
    """Return the bytes of the directory of a file that is whole; raise otherwise."""
    if not content.startswith(MAGIC):
        _fail(path, "be a file that ks.save_compressed wrote", f"which begins with {content[:8]!r}")
    if len(content) < _HEAD.size + _DIGEST_BYTES:
        _fail(path, "be a whole file", f"truncated after {len(content)} bytes")
    _, version, _, size, directory_bytes = _HEAD.unpack_from(content)
    if version != VERSION:
        _fail(
            path,
            f"be a file of version {VERSION}",
            f"of version {version}: corrupted, or written by a later keras_sparse",
        )
    if size != len(content):
        _fail(path, f"be a whole file of {size} bytes", f"of {len(content)} bytes: truncated or corrupted")
    if hashlib.sha256(memoryview(content)[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        _fail(path, "be a file with the checksum written in it", "corrupted")
    if directory_bytes > len(content) - _HEAD.size - _DIGEST_BYTES:
        _fail(path, "hold its directory", f"a directory of {directory_bytes} bytes")
    return directory_bytes


def _parse(content, directory_bytes):
    view = memoryview(content)[_HEAD.size : -_DIGEST_BYTES]
    directory = json.loads(bytes(view[:directory_bytes]))
    place = directory_bytes

    def take(count):
        nonlocal place
        if validation.integer("bytes", count, at_least=0) > len(view) - place:
            raise ValueError(f"{count} bytes are more than the {len(view) - place} that are left")
        place += count
        return view[place - count : place]

    members = {}
    for entry in directory["members"]:
        members[_member_name(entry["name"])] = _inflate(take(entry["stored"]), entry["bytes"])
    tensors = []
    for entry in directory["tensors"]:
        parts = tuple(np.frombuffer(take(count), "uint8") for count in entry["parts"])
        shape = tuple(validation.integer("shape", size, at_least=0) for size in entry["shape"])
        if not isinstance(entry["path"], str):
            validation.fail("path", "be a string", entry["path"], TypeError)
        tensors.append((entry["path"], _decode(entry, shape, parts, tensors), dict(entry["attributes"])))
    if place != len(view):
        raise ValueError(f"{len(view) - place} bytes belong to nothing")
    groups = {str(name): dict(attributes) for name, attributes in directory["groups"].items()}
    if len({name for name, *_ in tensors} | set(groups)) != len(tensors) + len(groups):
        raise ValueError("a tensor or group has the name of another")
    return members, groups, {name: (array, attributes) for name, array, attributes in tensors}


def _decode(entry, shape, parts, earlier):
    dtype = encodings.dtype_of(entry["dtype"])
    if entry["encoding"]["encoding"] == _NONZERO:
        _, kernel, _ = earlier[validation.integer("of", entry["encoding"]["of"], at_least=0)]
        if parts or not _nonzero_shape(kernel.shape, shape):
            raise ValueError(f"a mask of shape {shape} cannot be told from a tensor of shape {kernel.shape}")
        return _nonzero(kernel, shape).astype(dtype)
    encoding, stored = encodings.get(entry["encoding"]), sum(part.size for part in parts)
    decoded = encoding.decoded_values(shape) * dtype.itemsize
    if not encodings.may_decode_to(decoded, stored):
        raise ValueError(f"{stored} bytes cannot hold a tensor of {decoded}")
    return encodings.EncodedTensor(encoding, shape, entry["dtype"], parts).decode()


def _inflate(data, count):
    """Return the `count` bytes that `data` holds, without making more of them than that."""
    inflater = zlib.decompressobj()
    content = inflater.decompress(bytes(data), max(validation.integer("bytes", count, at_least=0), 1))
    if len(content) != count or not inflater.eof or inflater.unused_data:
        raise ValueError(f"a member does not have the {count} bytes it should")
    return content


def _member_name(name):
    """Return the name of a file in the archive, which must stay inside it."""
    parts = pathlib.PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\\" in name or name == _WEIGHTS:
        raise ValueError(f"{name!r} is no name of a member")
    return name
