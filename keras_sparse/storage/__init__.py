"""How sparse tensors are stored: bit-mask, CSR with relative indices, block CSR, and whole models in a file."""

from keras_sparse.storage.encodings import (
    CSR,
    Binary,
    BitMask,
    BlockCSR,
    Dense,
    EncodedTensor,
    Encoding,
    candidates,
    encode,
    get,
    nbytes,
    smallest,
)
from keras_sparse.storage.models import compressed_bytes, load_compressed, save_compressed

__all__ = [
    "CSR",
    "Binary",
    "BitMask",
    "BlockCSR",
    "Dense",
    "EncodedTensor",
    "Encoding",
    "candidates",
    "compressed_bytes",
    "encode",
    "get",
    "load_compressed",
    "nbytes",
    "save_compressed",
    "smallest",
]
