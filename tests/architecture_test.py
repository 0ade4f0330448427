"""The arrows of docs/architecture.md: which room may import which, and where TensorFlow may be named."""

import ast
import pathlib
import re

import pytest

import keras_sparse

PACKAGE = pathlib.Path(keras_sparse.__file__).parent
ROOT = PACKAGE.parent

# room -> the rooms of the package it may import; a room is a file or a folder below keras_sparse/
ALLOWED = {
    "validation": set(),
    "files": set(),
    "granularity": {"validation"},
    "gradients": {"validation"},
    "criteria": {"gradients", "granularity", "validation"},
    "allocation": {"validation"},
    "schedules": {"validation"},
    "initializers": {"allocation", "criteria", "validation"},
    "regularizers": {"granularity", "validation"},
    "layers": {"granularity", "validation"},
    "selection": {"validation"},
    "probing": {"selection", "validation"},
    "surgery": {"granularity", "layers", "selection", "validation"},
    "callbacks": {
        "allocation",
        "criteria",
        "files",
        "gradients",
        "granularity",
        "initializers",
        "layers",
        "regularizers",
        "report",
        "schedules",
        "selection",
        "surgery",
        "validation",
    },
    "storage": {"files", "granularity", "validation"},
    "pruning": {"callbacks", "granularity", "schedules", "validation"},
    "report": {"files", "layers", "probing", "selection", "storage", "validation"},
    "interop": {"granularity", "schedules", "selection", "surgery", "validation"},
    "ops": {"validation"},
    "engine": {"ops", "validation"},
    "export": {"engine", "layers", "ops", "probing", "selection", "surgery", "validation"},
}
TENSORFLOW_ROOMS = {"ops", "engine", "export"}
# Beside these rooms two files, which import TensorFlow when they are used: event files, on any backend, and gradients,
# on TensorFlow's own.
TENSORFLOW_FILES = {PACKAGE / "report" / "tensorboard.py", PACKAGE / "gradients.py"}


def imports_of(path):
    """Return the dotted names a Python file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("")
        if relative.parts != ("__init__",):
            yield relative.parts[0], path


def test_every_room_is_listed():
    assert {room for room, _ in files()} == set(ALLOWED)


@pytest.mark.parametrize(("room", "path"), [pytest.param(r, p, id=str(p.relative_to(PACKAGE))) for r, p in files()])
def test_imports_follow_the_arrows(room, path):
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "keras_sparse" and len(parts) > 1 and parts[1] in ALLOWED and parts[1] != room:
            assert parts[1] in ALLOWED[room], f"{room} must not import {name}"
        if parts[0] == "tensorflow":
            assert room in TENSORFLOW_ROOMS or path in TENSORFLOW_FILES, f"{room} must not import TensorFlow"


def test_the_arrows_hold_no_cycle():
    done = set()
    while len(done) < len(ALLOWED):
        ready = {room for room, needs in ALLOWED.items() if room not in done and needs <= done}
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready


def test_compute_routines_include_neither_tensorflow_nor_eigen_nor_python():
    sources = [p for p in (ROOT / "custom_ops" / "kernels").rglob("*") if p.suffix in (".cc", ".h", ".inc", ".cu")]
    assert sources
    for path in sources:
        for header in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text()):
            assert not re.match(r"(tensorflow|tsl|xla|Eigen|unsupported|absl|Python)", header), f"{path}: {header}"
