"""What the benchmarks share: result files, and turns between engines."""

import math
import os
import pathlib
import statistics
import sys
import time


def busy_cores(seconds=0.5):
    """Return how many cores are at work while this process sleeps, or None where the system does not tell."""
    path = pathlib.Path("/proc/stat")
    if not path.exists():
        return None

    def idle_ticks():
        fields = path.read_text().splitlines()[0].split()
        return int(fields[4]) + int(fields[5])  # idle, and waiting for a disk

    before, start = idle_ticks(), time.perf_counter()
    time.sleep(seconds)
    idle = (idle_ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)
    return round(max(0.0, os.cpu_count() - idle), 2)


def write_result(path, result):
    """Write a result as JSON, whole or not at all, with the machine and the command in front."""
    import tensorflow as tf  # here: the choice of threads comes before it

    from keras_sparse import files
    from keras_sparse.engine import machine

    files.write_json(path, {"machine": machine.describe(), "tensorflow": tf.__version__, "command": sys.argv, **result})


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def take_turns(engines, repeats, turn_seconds=0.15, settle=0.02, progress=None):
    """Time engines turn by turn, so that a machine that slows down slows all of them.

    Args:
        engines: `{name: engine}`; `engine.turn(calls)` calls the network that often, one after the other on rotating
            inputs, after one call that is not counted, and returns the seconds of each.
        repeats: Turns of each engine. Who begins changes from round to round.
        turn_seconds: How long a turn lasts, roughly: a fast engine is called more often.
        settle: Seconds of silence before a turn, in which the threads of the last engine go to sleep.
        progress: Function of the number of rounds done.

    Returns:
        `{name: list of seconds}`.
    """
    calls = {}
    for name, engine in engines.items():
        first = engine.turn(1)[0]  # after a call that optimises and allocates
        typical = first if first > turn_seconds else statistics.median(engine.turn(3))
        calls[name] = max(1, min(64, round(turn_seconds / typical)))
    seconds = {name: [] for name in engines}
    names = list(engines)
    for done in range(repeats):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            time.sleep(settle)
            seconds[name] += engines[name].turn(calls[name])
        if progress:
            progress(done + 1)
    return seconds
