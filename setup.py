import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "_build_backend"))

from ks_cmake import BuildWithCMake, CMakeExtension, WheelForAnyPython  # noqa: E402
from ks_tensorflow import runtime_requirement  # noqa: E402

setup(
    install_requires=["keras>=3.10,<4", "numpy>=1.26", runtime_requirement()],
    ext_modules=[CMakeExtension("keras_sparse.ops._keras_sparse_ops", source_dir=ROOT)],
    cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": WheelForAnyPython},
)
