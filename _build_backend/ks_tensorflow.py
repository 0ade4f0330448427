"""Finds the TensorFlow that the op is to be compiled against.

That is the one of the environment the package is being installed into, since the C++ ABI matches
within one major.minor version only. An isolated build hides that environment's site-packages from
imports, but it runs the same interpreter, so `sysconfig` still says where it is.
"""

import importlib.util
import os
import re
import site
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

MINIMUM = (2, 19)
BEYOND = (2, 22)
SUPPORTED = f">={MINIMUM[0]}.{MINIMUM[1]},<{BEYOND[0]}.{BEYOND[1]}"
# What is built against, and then required at run time, where there is no TensorFlow yet.
DEFAULT_REQUIREMENT = f"tensorflow-cpu{SUPPORTED}"
ROOT_VARIABLE = "KERAS_SPARSE_TF_ROOT"

# Each provides the package `tensorflow`. Where several lie over one another the first one counts.
_DISTRIBUTIONS = ("tensorflow", "tensorflow-cpu", "tensorflow-rocm", "tensorflow-gpu")
_HEADER = Path("include", "tensorflow", "core", "framework", "op_kernel.h")


class TensorFlow(NamedTuple):
    """An installed TensorFlow: its package folder, the distribution it came with, its version."""

    root: Path
    distribution: str
    version: str

    @property
    def requirement(self):
        """What asks for this distribution in any version of the same C++ ABI."""
        major, minor = _major_minor(self.version)
        return f"{self.distribution}=={major}.{minor}.*"


def of_target_environment():
    """The TensorFlow the package will run with, or None where there is none yet."""
    override = os.environ.get(ROOT_VARIABLE)
    if override:
        found = _inspect(Path(override).resolve())
        if found is None:
            raise RuntimeError(
                f"{ROOT_VARIABLE} must name the folder of an installed `tensorflow` package, with "
                f"{_HEADER} in it and, beside it, the .dist-info folder of one of "
                f"{', '.join(_DISTRIBUTIONS)}; it is {override!r}"
            )
    else:
        candidates = (_inspect(folder / "tensorflow") for folder in _site_packages())
        found = next(filter(None, candidates), None)
    if found is not None and not MINIMUM <= _major_minor(found.version) < BEYOND:
        raise RuntimeError(
            f"keras_sparse needs TensorFlow {SUPPORTED}, and {found.root} is {found.distribution} "
            f"{found.version}: install another version there first, or name the folder of another "
            f"TensorFlow in {ROOT_VARIABLE}"
        )
    return found


def to_build_against():
    """The target environment's TensorFlow, else the build environment's, else None."""
    found = of_target_environment()
    if found is None:
        spec = importlib.util.find_spec("tensorflow")
        if spec is not None and spec.submodule_search_locations:
            found = _inspect(Path(spec.submodule_search_locations[0]))
    return found


def runtime_requirement():
    """The requirement that ties a build to the TensorFlow it is for."""
    found = to_build_against()
    return DEFAULT_REQUIREMENT if found is None else found.requirement


def _site_packages():
    schemes = [sysconfig.get_paths()]
    if _sees_system_packages():
        system = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        schemes.append(sysconfig.get_paths(vars=system))
    folders = [scheme[key] for scheme in schemes for key in ("platlib", "purelib")]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in dict.fromkeys(folders)]


def _sees_system_packages():
    """Whether this is a virtual environment made with --system-site-packages."""
    config = Path(sys.prefix, "pyvenv.cfg")
    setting = r"^include-system-site-packages\s*=\s*true\s*$"
    return config.exists() and re.search(setting, config.read_text().lower(), re.MULTILINE)


def _inspect(root):
    if not (root / _HEADER).exists():
        return None
    versions = {
        (found.metadata["Name"] or "").lower().replace("_", "-"): found.version
        for found in metadata.distributions(path=[str(root.parent)])
    }
    for distribution in _DISTRIBUTIONS:
        if distribution in versions:
            return TensorFlow(root, distribution, versions[distribution])
    return None


def _major_minor(version):
    return tuple(int(part) for part in version.split(".")[:2])
