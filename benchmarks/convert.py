"""Converts a dense SavedModel of `ks.export` for another engine, at a fixed batch size.

    python convert.py SAVED_MODEL BATCH OUT.onnx|OUT.tflite

For .tflite TensorFlow is enough; .onnx needs tf2onnx, onnx and onnxruntime beside it, which networks.py finds in an
environment of their own. The ONNX network takes NCHW, and its batch norms are folded into the convolutions, by the
standard operators alone: an engine that cannot do so by itself is not the slower for it.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# What DeepSparse 1.8 knows.
OPSET = 13


def to_onnx(function, spec, path):
    import onnxruntime
    import tf2onnx

    unfolded = f"{path}.unfolded"
    tf2onnx.convert.from_function(
        function, input_signature=[spec], opset=OPSET, inputs_as_nchw=[f"{spec.name}:0"], output_path=unfolded
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = path
    onnxruntime.InferenceSession(unfolded, options, providers=["CPUExecutionProvider"])
    os.remove(unfolded)


def to_tflite(function, path):
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], function)
    with open(path, "wb") as file:
        file.write(converter.convert())


def main():
    import tensorflow as tf

    saved_model, batch, path = sys.argv[1:]
    module = tf.saved_model.load(saved_model)
    given = module.serve.input_signature[0]
    spec = tf.TensorSpec((int(batch), *given.shape[1:]), given.dtype, name="inputs")
    function = tf.function(lambda inputs: module.serve(inputs), input_signature=[spec])
    if path.endswith(".onnx"):
        to_onnx(function, spec, path)
    else:
        to_tflite(function, path)


if __name__ == "__main__":
    main()
