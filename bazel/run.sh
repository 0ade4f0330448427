#!/usr/bin/env bash
# Builds the op library and runs the C++ tests with Bazel, then loads the library into TensorFlow.
# Usage: PYTHON=.venv/bin/python bazel/run.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
googletest=/usr/src/googletest/googletest

if ! command -v bazel >/dev/null || [ ! -d "$googletest" ]; then
  packages=(bazel-bootstrap libgtest-dev)
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "Bazel and GoogleTest's sources are needed; on Debian: sudo apt-get install ${packages[*]}" >&2
    exit 1
  fi
  apt-get -qq update || true  # one unreachable source need not matter
  DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "${packages[@]}" </dev/null >/dev/null
fi

# Where WORKSPACE looks for TensorFlow.
mkdir -p bazel/local
"$python" - <<'PYTHON'
import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, "_build_backend")
import ks_tensorflow

found = ks_tensorflow.to_build_against()
if found is None:
    sys.exit("no TensorFlow was found: run `make env` first")
link = Path("bazel/local/tensorflow")
link.unlink(missing_ok=True)
link.symlink_to(os.path.relpath(found.root, link.parent.resolve()))
Path("bazel/local/version.bzl").write_text(f'TENSORFLOW_VERSION = "{found.version}"\n')
PYTHON

bazel --batch test //...

# With oneDNN on, TensorFlow logs at import whatever the level.
TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0 "$python" - build/bazel/bin/_keras_sparse_ops.so custom_ops/tensorflow/*.cc <<'PYTHON'
import re
import sys
from pathlib import Path

import tensorflow as tf
from tensorflow.python.framework import op_def_registry

library, *sources = sys.argv[1:]
texts = [Path(source).read_text() for source in sources]
wanted = {op for text in texts for op in re.findall(r'REGISTER_OP\("([^"]+)"\)', text)}
tf.load_op_library(library)
missing = sorted(op for op in wanted if op_def_registry.get(op) is None)
if missing or not wanted:
    sys.exit(f"{library} does not register {missing or 'any op'}")
print(f"bazel: {library} loads into TensorFlow {tf.__version__} and registers {', '.join(sorted(wanted))}")
PYTHON
