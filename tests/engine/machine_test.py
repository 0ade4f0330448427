"""The machine's description in plans and results."""

import os

from keras_sparse.engine import machine


def test_it_tells_what_a_reader_of_a_measurement_asks():
    described = machine.describe()
    assert set(described) == {"processor", "flags", "cores", "system"}
    assert described["cores"] == os.cpu_count()
    assert described["processor"] and described["system"]
