# Copyright 2026 The keras_sparse Authors.
# Licensed under the Apache License, Version 2.0.
"""Lets the tests of this folder import `oracle`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
