"""The PEP 517 and 660 backend: setuptools, asking for TensorFlow where the target has none."""

import shutil

import ks_tensorflow
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def _tensorflow_if_missing():
    return [] if ks_tensorflow.of_target_environment() else [ks_tensorflow.DEFAULT_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _tensorflow_if_missing()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _tensorflow_if_missing()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools would pack whatever an earlier build left there: modules deleted since, or an op
    # for another TensorFlow.
    shutil.rmtree("build/setuptools", ignore_errors=True)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
