import numpy as np
import pytest

from keras_sparse.storage import bits


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 33, 1000])
def test_pack_and_back(width, count):
    values = np.random.default_rng(0).integers(0, 2**width, count)
    packed = bits.pack(values, width)
    # One integer of all bits, the first value in the lowest.
    whole = sum(int(value) << (width * place) for place, value in enumerate(values))
    assert packed.tobytes() == whole.to_bytes(bits.packed_bytes(count, width), "little")
    np.testing.assert_array_equal(bits.unpack(packed, count, width), values)


def test_unpack_refuses_what_pack_cannot_have_made():
    packed = bits.pack([1, 2, 3], 5)
    with pytest.raises(ValueError, match="3 integers of 5 bits take 2 bytes, not 3"):
        bits.unpack(np.append(packed, np.uint8(0)), 3, 5)
    with pytest.raises(ValueError, match="behind the last"):
        bits.unpack(packed | np.array([0, 128], "uint8"), 3, 5)
