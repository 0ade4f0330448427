"""Whole networks with random connection tables, beside TensorFlow and other inference engines.

    python benchmarks/networks.py --network vgg19 --density .04 --batch 1 64 --threads 2 --json out.json

Every convolution keeps the given share of its connections, drawn at random from a seed, in each layer alike; the first
convolution, which reads the 3 colours, and the classifier stay dense unless `--also` names them. Depthwise convolutions
have nothing to prune and stay as they are. Weights are random, batch norms hold the statistics of random images.

The same network, its pruned weights zero, is given to all engines: `ks.export` plans it for the batch size (where it
finds the dense network faster it writes that one, and says so: the ratio to TensorFlow is then about 1), TensorFlow
gets it as a dense export, as a graph over variables and compiled by XLA, and its fastest counts. The others run in
processes of their own, at a fixed batch size, from an ONNX or LiteRT file made of the dense export. All compute in
float32. One process works at a time, turn by turn, on rotating inputs; medians are compared, and every engine's outputs
are checked against TensorFlow's before. A ratio is another engine's time by ours: above 1, ours is faster.

Nothing else may run on the machine: engines whose threads wait for each other slow down tenfold where one of them
shares its core. How many cores are busy with something else is looked at before and after, recorded, and warned of.

`make bench-engines` makes the environments of the other engines. An engine that is missing is left out.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import common
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
TENSORFLOW = ("tf_constant", "tf_variable", "tf_xla")
# engine -> the file it reads
FOREIGN = {"deepsparse": "onnx", "onnxruntime": "onnx", "openvino": "onnx", "litert": "tflite"}
ENVIRONMENTS = {
    "deepsparse": ".venv-deepsparse",
    "onnxruntime": ".venv-engines",
    "openvino": ".venv-engines",
    "litert": ".venv-engines",
    "convert": ".venv-engines",
}
# float32 networks of some 50 layers; relative to the largest output
TOLERANCE = 1e-3
# What an engine may take to load a network, or for one turn.
TIMEOUT = 600
_INPUTS = 4


def say(text):
    print(text, file=sys.stderr, flush=True)


# --- The network ------------------------------------------------------------------------------------------------------


def pruned_layers(model, also=()):
    """Return the names of the layers to prune: all convolutions but the first, and what `also` adds."""
    import keras

    convolutions = [layer.name for layer in model.layers if type(layer) is keras.layers.Conv2D]
    classifier = [layer.name for layer in model.layers if type(layer) is keras.layers.Dense]
    return convolutions[0 if "first" in also else 1 :] + (classifier if "classifier" in also else [])


def random_mask(shape, density, generator):
    """Return a mask with exactly the given share of ones, one at least."""
    mask = np.zeros(int(np.prod(shape)), "float32")
    mask[generator.permutation(mask.size)[: max(1, round(mask.size * density))]] = 1
    return mask.reshape(shape)


def sparse_network(network, density, seed=0, also=(), granularity="connection", draw=random_mask):
    """Return a network of the zoo as sparse layers with random weights and masks.

    Weights are scaled for the connections that are left, and batch norms calibrated, so that values keep their size
    through the layers, as in a trained network, and errors are seen.
    """
    import keras

    import keras_sparse as ks

    keras.utils.set_random_seed(seed)
    generator = np.random.default_rng(seed)
    model = network.build()
    model = ks.sparsify(model, granularity=granularity, include=pruned_layers(model, also))
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            shape, kept = layer.kernel.shape, 1.0
            if hasattr(layer, "assign_mask"):
                mask = draw(layer.mask.shape, density, generator)
                layer.assign_mask(mask)
                kept = float(mask.mean())
            deviation = np.sqrt(2 / (np.prod(shape[:-1]) * kept))
            layer._kernel.assign(generator.standard_normal(shape) * deviation * getattr(layer, "mask", 1.0))
        elif isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
            if layer.gamma is not None:
                layer.gamma.assign(generator.uniform(0.8, 1.2, layer.gamma.shape))
            layer.beta.assign(generator.uniform(-0.2, 0.2, layer.beta.shape))
    images = generator.standard_normal((max(2, 16 * 32**2 // network.input_shape[0] ** 2), *network.input_shape))
    model(images.astype("float32"), training=True)  # with a momentum of 0 the statistics become those of the images
    return model


# --- Engines ----------------------------------------------------------------------------------------------------------


class InProcess:
    """A function of TensorFlow in this process."""

    def __init__(self, function, inputs, jit_compile=None):
        import tensorflow as tf

        spec = tf.TensorSpec(inputs.shape[1:], "float32")
        self.version = tf.__version__
        self._graph = tf.function(function, jit_compile=jit_compile).get_concrete_function(spec)
        self._inputs = [tf.constant(x) for x in inputs]
        self._called = 0

    def turn(self, calls):
        seconds = []
        for _ in range(calls + 1):  # the first one fills the caches
            x = self._inputs[self._called % len(self._inputs)]
            self._called += 1
            start = time.perf_counter()
            self._graph(x).numpy()
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def outputs(self):
        return self._graph(self._inputs[0]).numpy()

    def close(self):
        pass


class EngineError(Exception):
    """Why an engine is left out."""


class Worker:
    """An engine in a process of its own, stopped by signals while it is not its turn: idle threads of some spin."""

    def __init__(self, engine, python, model, inputs, threads, folder):
        command = [str(python), str(HERE / "engine_worker.py"), engine, str(model), str(inputs), str(threads)]
        self._folder = folder
        self._log = open(os.path.join(folder, f"{engine}.log"), "w+")  # noqa: SIM115
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        try:
            self.version = self._answer()["version"]
            self._stop()
        except BaseException:
            self.close()
            raise

    def _answer(self):
        with _deadline(TIMEOUT, self._process):
            line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["no message"])[-1]
            raise EngineError(f"its process ended with {self._process.returncode}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _ask(self, **request):
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answer()
        self._stop()
        return answer

    def _stop(self):
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, calls):
        return self._ask(turn=calls)["seconds"]

    def outputs(self):
        path = os.path.join(self._folder, "outputs.npy")
        self._ask(outputs=path)
        return np.load(path)

    def close(self):
        self._process.kill()  # works on a stopped process as well
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()


@contextlib.contextmanager
def _deadline(seconds, process):
    """Kill the process after that time, which ends the wait for its answer."""

    def expire(*_):
        process.kill()

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def convert(python, saved_model, batch, path):
    """Write the dense export as an ONNX or LiteRT file; raises EngineError where that fails."""
    command = [str(python), str(HERE / "convert.py"), str(saved_model), str(batch), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"no {path.suffix} file: {error}") from None
    if done.returncode or not path.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"no {path.suffix} file: {last}")


# --- Cells ------------------------------------------------------------------------------------------------------------


class Cell:
    """One network at one density and batch size: engines to start, check and time."""

    def __init__(self, model, inputs, args, folder):
        self.model, self.inputs, self.args, self.folder = model, inputs, args, pathlib.Path(folder)
        self.engines, self.records = {}, {}
        self.plan = self.busy_cores = None
        self._converted = {}

    def start(self):
        import keras_sparse as ks

        batch = self.inputs.shape[1]
        dense = self.folder / "dense"
        ks.export(self.model, dense, "dense", verbose=False)
        reference = self._add("tf_constant", lambda: InProcess(ks.load(dense), self.inputs), None)
        if "op" in self.args.engines:
            say(f"  ks.export plans for batch size {batch}")
            self.plan = ks.export(self.model, self.folder / "op", "op", batch_size=batch, verbose=False)
            chosen = collections.Counter(layer["routine"] for layer in self.plan["layers"].values())
            say(f"  chosen: {', '.join(f'{routine} {count}x' for routine, count in chosen.items())}")
            self._add("op", lambda: InProcess(ks.load(self.folder / "op"), self.inputs), reference)
        if "tensorflow" in self.args.engines:
            stripped = ks.strip(self.model)
            stripped.trainable = False

            def network(x):
                return stripped(x, training=False)

            self._add("tf_variable", lambda: InProcess(network, self.inputs), reference)
            self._add("tf_xla", lambda: InProcess(network, self.inputs, jit_compile=True), reference)
        else:
            del self.engines["tf_constant"]
        for engine in FOREIGN:
            if engine in self.args.engines:
                self._add(engine, lambda engine=engine: self._worker(engine), reference)

    def _worker(self, engine):
        python = getattr(self.args, f"{engine}_python")
        if not os.path.exists(python):
            raise EngineError(f"there is no {python}; `make bench-engines` makes it")
        return Worker(engine, python, self._file(FOREIGN[engine]), self._inputs_file(), self.args.threads, self.folder)

    def _inputs_file(self):
        path = self.folder / "inputs.npy"
        if not path.exists():
            np.save(path, self.inputs)
        return path

    def _file(self, kind):
        path = self.folder / f"network.{kind}"
        if kind not in self._converted:
            say(f"  converting to .{kind}")
            python = self.args.convert_python if kind == "onnx" else sys.executable
            try:
                convert(python, self.folder / "dense", self.inputs.shape[1], path)
                self._converted[kind] = path
            except EngineError as error:
                self._converted[kind] = error
        if isinstance(self._converted[kind], EngineError):
            raise self._converted[kind]
        return path

    def _add(self, name, make, reference):
        """Start an engine and check it against the outputs `reference`; returns its own outputs."""
        try:
            engine = make()
            self.engines[name] = engine
            outputs = engine.outputs()
            error = 0.0
            if reference is not None:
                error = float(np.abs(outputs - reference).max() / np.abs(reference).max())
                if not error < TOLERANCE:
                    raise EngineError(f"its outputs differ from TensorFlow's by {error:.1e} of the largest")
        except Exception as error:
            if name in ("op", "tf_constant"):  # what the comparison is about
                raise SystemExit(f"{name}: {error}") from error
            say(f"  {name}: left out, {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            if name in self.engines:
                self.engines.pop(name).close()
            return None
        self.records[name] = {"version": engine.version, "largest_relative_error": error}
        return outputs

    def time(self):
        self._drop_slow_variants()

        def progress(done):
            if sys.stderr.isatty() or done == self.args.repeats:
                end = "\n" if done == self.args.repeats else "\r"
                print(f"  {done} of {self.args.repeats} rounds", end=end, file=sys.stderr, flush=True)

        busy = [common.busy_cores()]
        seconds = common.take_turns(self.engines, self.args.repeats, progress=progress)
        busy.append(common.busy_cores())
        self.busy_cores = max((cores for cores in busy if cores is not None), default=None)
        if self.busy_cores is not None and self.busy_cores > 0.2:
            say(
                f"  WARNING: other processes keep {self.busy_cores:.1f} cores busy. Engines whose threads wait for "
                "each other are slowed down many times by that, others hardly: do not compare them."
            )
        return {name: {**self.records[name], **summary(times)} for name, times in seconds.items()}

    def _drop_slow_variants(self):
        """Leave out TensorFlow's ways that cannot be its fastest, so that they cost no time."""
        first_look = {name: min(self.engines[name].turn(2)) for name in TENSORFLOW if name in self.engines}
        for name, seconds in first_look.items():
            if seconds > 3 * min(first_look.values()):
                say(f"  {name}: left out, {seconds / min(first_look.values()):.1f} times as slow as TensorFlow's best")
                self.engines.pop(name).close()

    def close(self):
        for engine in self.engines.values():
            engine.close()


def summary(seconds):
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "ms": statistics.median(seconds) * 1e3,
        "quartiles_ms": [quartiles[0] * 1e3, quartiles[2] * 1e3],
        "fastest_ms": min(seconds) * 1e3,
        "calls": len(seconds),
    }


def compare(times):
    """Return `{engine: milliseconds}` with TensorFlow's best as one engine, and the ratios to ours."""
    best = {}
    for name, record in times.items():
        engine = "tensorflow" if name in TENSORFLOW else name
        best[engine] = min(best.get(engine, float("inf")), record["ms"])
    ratios = {name: ms / best["op"] for name, ms in best.items() if name != "op"} if "op" in best else {}
    return best, ratios


def table(records):
    """Return the lines of a table: milliseconds of each engine, and behind them the ratio to ours."""
    order = ("op", "tensorflow", *FOREIGN)
    engines = [e for e in order if any(e in record["milliseconds"] for record in records)]
    head = f"{'network':12s} {'density':>7s} {'batch':>5s}"
    lines = [head + "".join(f" {'ks op' if e == 'op' else e:>16s}" for e in engines)]
    for record in records:
        line = f"{record['network']:12s} {record['density']:7.3f} {record['batch']:5d}"
        for engine in engines:
            cell = "-"
            if engine in record["milliseconds"]:
                cell = f"{record['milliseconds'][engine]:.2f}"
                cell += f" ({record['ratios'][engine]:5.2f})" if engine in record["ratios"] else ""
            line += f" {cell:>16s}"
        lines.append(line)
    return lines


def run(args):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    from networks_zoo import NETWORKS

    import keras_sparse as ks

    if "op" in args.engines and not ks.ops.is_available():
        raise SystemExit("The compiled ops are missing: there is nothing to compare.")
    records = []
    for name, density in itertools.product(args.network, args.density):
        say(f"{name} at density {density:g}: building")
        network = NETWORKS[name]
        model = sparse_network(network, density, args.seed, args.also)
        total = ks.count(model)["total"]
        for batch in args.batch:
            say(f"{name} at density {density:g}, batch size {batch}, {args.threads} thread(s)")
            generator = np.random.default_rng(args.seed + 1)
            inputs = generator.standard_normal((_INPUTS, batch, *network.input_shape), dtype="float32")
            with tempfile.TemporaryDirectory() as folder:
                cell = Cell(model, inputs, args, folder)
                try:
                    cell.start()
                    times = cell.time()
                finally:
                    cell.close()
            milliseconds, ratios = compare(times)
            record = {
                "network": name,
                "density": density,
                "batch": batch,
                "threads": args.threads,
                "dense_layers": sorted({"first", "classifier"} - set(args.also)),
                "madds": total["madds"],
                "params": total["params"],
                "nnz": total["nnz"],
                "milliseconds": milliseconds,
                "ratios": ratios,
                "engines": times,
                "busy_cores": cell.busy_cores,
                "plan": cell.plan,
            }
            records.append(record)
            print("\n".join(table([record])), flush=True)
            if args.json:  # what is done is not lost
                common.write_result(args.json, {"threads": args.threads, "records": records})
    print("\nMilliseconds, and in brackets the ratio to the first column; above 1, ours is faster.")
    print("\n".join(table(records)))
    return records


def parse(arguments=None):
    import networks_zoo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["vgg19"], choices=tuple(networks_zoo.NETWORKS))
    parser.add_argument("--density", type=float, nargs="+", default=[0.04])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, default=2)
    engines = ("op", "tensorflow", *FOREIGN)
    parser.add_argument("--engines", nargs="+", default=list(engines), choices=engines)
    parser.add_argument("--also", nargs="+", default=[], choices=("first", "classifier"), help="prune these as well")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the records, rewritten after each cell")
    for engine, environment in ENVIRONMENTS.items():
        default = HERE.parent / environment / "bin" / "python"
        parser.add_argument(f"--{engine}-python", default=str(default), help=f"interpreter with {engine}")
    args = parser.parse_args(arguments)
    if not all(0 < density <= 1 for density in args.density):
        parser.error(f"--density must lie in (0, 1], received {args.density}")
    if min(*args.batch, args.threads, args.repeats) < 1:
        parser.error("--batch, --threads and --repeats must be at least 1")
    return args


if __name__ == "__main__":
    run(parse())
