"""A setuptools extension built by CMake: the library of TensorFlow ops, not a Python module."""

import os
import shutil
import subprocess
from pathlib import Path

import ks_tensorflow
from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# auto: where the op cannot be built, install without it; require: fail then; skip: do not try.
MODE_VARIABLE = "KERAS_SPARSE_BUILD"
# How many compilers run at a time; by default one per processor.
JOBS_VARIABLE = "KERAS_SPARSE_JOBS"
BUILD_INFO = "_build_info.json"


class CMakeExtension(Extension):
    """The op library; where it cannot be built, the package is installed without it."""

    def __init__(self, name, source_dir):
        super().__init__(name, sources=[], optional=_mode() != "require")
        self.source_dir = Path(source_dir)


class BuildWithCMake(build_ext):
    """Configures and builds a `CMakeExtension`; CMake writes `_build_info.json` beside it."""

    def get_ext_filename(self, fullname):
        # Without setuptools' tag of a Python version: every Python loads the same library.
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext):
        if _mode() == "skip":
            print(f"{MODE_VARIABLE}=skip: the compiled op is left out")
            return
        try:
            self._build(ext)
        except subprocess.CalledProcessError as error:
            raise _not_built("CMake failed, see above") from error
        except (OSError, RuntimeError) as error:
            raise _not_built(error) from error

    def copy_extensions_to_source(self):
        """Completes an editable install, for which setuptools copies the library alone."""
        super().copy_extensions_to_source()
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name)).with_name(BUILD_INFO)
            if built.exists():
                package = build_py.get_package_dir(ext.name.rpartition(".")[0])
                self.copy_file(str(built), str(Path(package, BUILD_INFO)))

    def _build(self, ext):
        tensorflow = ks_tensorflow.to_build_against()
        if tensorflow is None:
            raise RuntimeError(f"there is no TensorFlow {ks_tensorflow.SUPPORTED} to compile for")
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        ninja = shutil.which("ninja")
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTF_ROOT={tensorflow.root}",
            f"-DTF_VERSION={tensorflow.version}",
            f"-DKS_OUTPUT_DIR={library.parent}",
        ]
        if ninja:
            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]

        # The folder is kept, so that a change of one source recompiles one source, unless its
        # cache may point into an isolated environment that is gone.
        folder = ext.source_dir / "build" / "cmake"
        record = folder / "configured_by.txt"
        settings = "\n".join(
            [cmake, str(ninja), str(tensorflow.root), tensorflow.version]
            + [f"{name}={os.environ.get(name)}" for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
        )
        if not record.exists() or record.read_text() != settings:
            shutil.rmtree(folder, ignore_errors=True)
        _run([cmake, "-S", str(ext.source_dir), "-B", str(folder), *options])
        record.write_text(settings)
        jobs = os.environ.get(JOBS_VARIABLE) or str(len(os.sched_getaffinity(0)))
        _run([cmake, "--build", str(folder), "--parallel", jobs])
        if not library.exists():
            raise RuntimeError(f"CMake succeeded without writing {library}")


class WheelForAnyPython(bdist_wheel):
    """Tags the wheel by platform alone: no file in it depends on the Python that built it."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def _run(command):
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _not_built(reason):
    # The one exception after which setuptools goes on without an optional extension.
    return CompileError(
        f"The compiled op of keras_sparse could not be built: {reason}. "
        "It takes a C++17 compiler (on Debian or Ubuntu: apt-get install g++). "
        "Without the op the package works, in pure Python and slower; "
        f"{MODE_VARIABLE}=require makes this an error."
    )


def _mode():
    mode = os.environ.get(MODE_VARIABLE) or "auto"
    if mode not in ("auto", "require", "skip"):
        raise RuntimeError(f"{MODE_VARIABLE} must be auto, require or skip, not {mode!r}")
    return mode
