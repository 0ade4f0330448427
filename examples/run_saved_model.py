"""Run an exported SavedModel with nothing but TensorFlow, as a server would.

python examples/run_saved_model.py EXPORT_FOLDER INPUTS.npy OUTPUTS.npy [--op-library FILE]

An export of backend "op" needs the library of compiled ops (`keras_sparse.ops.library_path()`), the others do not.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("saved_model")
    parser.add_argument("inputs", help=".npy file, batch first")
    parser.add_argument("outputs", help=".npy file to write")
    parser.add_argument("--op-library", help="library of the compiled ops")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    if args.op_library:
        tf.load_op_library(args.op_library)
    serve = tf.saved_model.load(args.saved_model).signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    inputs = np.load(args.inputs)
    batches = [
        serve(**{name: tf.constant(inputs[start : start + args.batch_size])})["output_0"].numpy()
        for start in range(0, len(inputs), args.batch_size)
    ]
    np.save(args.outputs, np.concatenate(batches))


if __name__ == "__main__":
    main()
