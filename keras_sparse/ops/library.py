# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""Finds, checks and loads the compiled op library.

The C++ interface of TensorFlow holds within one minor version only, so the version the library was
built for is read from the file before it is loaded.
"""

import os
import re
import warnings

import tensorflow as tf

_FILE_NAME = "_keras_sparse_ops.so"
_MARKER = re.compile(rb"keras_sparse-tensorflow-version:([0-9][^;]{0,63});")
_REBUILD = (
    "reinstall keras_sparse from source where TensorFlow and a C++ compiler are installed "
    "(`pip install --force-reinstall --no-deps --no-binary keras_sparse keras_sparse`, or `cmake` "
    "in a checkout)"
)


class _State:
    """What became of loading: `module` holds the ops once they are loaded."""

    tried = False
    module = None


def _file():
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), _FILE_NAME)


def library_path():
    """Returns the path of the compiled op library.

    For `tf.load_op_library` in a process without this package, and for `TF_LoadLibrary` in C.

    Returns:
        The absolute path, a `str`.

    Raises:
        FileNotFoundError: If the package was installed without the library.
    """
    path = _file()
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"The op library of keras_sparse must be at {path}, and there is no such file: the "
            f"package was installed without a compiler. To have it, {_REBUILD}."
        )
    return path


def is_available():
    """Returns whether the compiled ops are loaded; if not, the reference computes."""
    return load() is not None


def built_for(path):
    """Returns the TensorFlow version that the library at `path` was built for, or None."""
    with open(path, "rb") as file:
        match = _MARKER.search(file.read())
    return match.group(1).decode("ascii") if match else None


def _load():
    try:
        path = library_path()
    except FileNotFoundError as error:
        return None, str(error)
    version = built_for(path)
    if version is None or version.split(".")[:2] != tf.__version__.split(".")[:2]:
        return None, (
            f"The op library {path} must be built for the TensorFlow in use, {tf.__version__}; it "
            f"was built for {version or 'an unknown version'}. Either install that version, or "
            f"{_REBUILD}."
        )
    try:
        return tf.load_op_library(path), None
    except (tf.errors.OpError, OSError) as error:
        return (
            None,
            f"The op library {path} could not be loaded ({error}). To repair it, {_REBUILD}.",
        )


def load():
    """Loads the compiled ops, once per process.

    If they are missing or were built for another TensorFlow, one `RuntimeWarning` says what to do.

    Returns:
        The module of the raw ops, or None.
    """
    if not _State.tried:
        _State.tried = True
        _State.module, problem = _load()
        if problem:
            warnings.warn(
                f"{problem} Until then keras_sparse computes with dense convolutions: results are "
                "the same, but nothing gets faster.",
                RuntimeWarning,
                stacklevel=3,
            )
    return _State.module
