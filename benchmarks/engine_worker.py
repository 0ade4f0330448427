"""Runs a network in another engine for networks.py, which starts it with the interpreter of that engine.

    python engine_worker.py ENGINE MODEL INPUTS THREADS

INPUTS is an .npy file of several NHWC batches. Requests and answers are lines of JSON on stdin and stdout:
{"turn": 3} is answered by {"seconds": [...]} of 3 calls, {"outputs": "out.npy"} writes the outputs on the first batch.
The first line tells {"version": ...} once the engine is ready, or {"error": ...}.

Needs nothing but NumPy and the engine.
"""

import contextlib
import json
import os
import sys
import time

import numpy as np


def deepsparse(model, inputs, threads):
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")
    import deepsparse

    engine = deepsparse.compile_model(model, batch_size=inputs.shape[1], num_cores=threads)
    return deepsparse.__version__, lambda x: engine.run([x])[0]


def onnxruntime(model, inputs, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return onnxruntime.__version__, lambda x: session.run(None, {name: x})[0]


def openvino(model, inputs, threads):
    import openvino

    # float32, as all the others: by default it computes in bfloat16 where the processor can.
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def run(x):
        request.infer([openvino.Tensor(x, shared_memory=True)])
        return request.get_output_tensor(0).data

    return openvino.__version__, run


def litert(model, inputs, threads):
    import importlib.metadata

    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model, num_threads=threads)  # applies XNNPACK by itself
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(x):
        interpreter.set_tensor(source, x)
        interpreter.invoke()
        return interpreter.get_tensor(target)

    return importlib.metadata.version("ai-edge-litert"), run


# engine -> (how it starts, whether it takes NCHW)
ENGINES = {
    "deepsparse": (deepsparse, True),
    "onnxruntime": (onnxruntime, True),
    "openvino": (openvino, True),
    "litert": (litert, False),
}


def end_with_parent():
    """Ask Linux to end this process with its parent, which may have stopped it for another's turn."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def main():
    end_with_parent()
    # Engines print to stdout as they please: it goes to stderr, and answers to where stdout was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    name, model, inputs, threads = sys.argv[1:]
    start, channels_first = ENGINES[name]
    inputs = np.load(inputs)
    if channels_first:
        inputs = np.ascontiguousarray(inputs.transpose(0, 1, 4, 2, 3))
    try:
        version, run = start(model, inputs, int(threads))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
        return
    answer(version=version)
    called = 0
    for line in sys.stdin:
        request = json.loads(line)
        if "outputs" in request:
            np.save(request["outputs"], np.array(run(inputs[0])))
            answer(done=True)
            continue
        seconds = []
        for _ in range(request["turn"] + 1):  # the first one fills the caches
            x = inputs[called % len(inputs)]
            called += 1
            begin = time.perf_counter()
            run(x)
            seconds.append(time.perf_counter() - begin)
        answer(seconds=seconds[1:])


if __name__ == "__main__":
    main()
