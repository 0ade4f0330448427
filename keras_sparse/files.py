"""Files that are written whole or not at all."""

import contextlib
import json
import os
import tempfile

__all__ = ["replacing", "write_json"]


@contextlib.contextmanager
def replacing(path):
    """Give the name of a file to write, which takes the place of `path` once the block ends without an error.

    Whoever reads `path` meanwhile sees the old file or none; after an error or a crash it is as it was.

    Args:
        path: Name of the file; its folder is made where it is missing.

    Yields:
        Name of an empty file in the same folder, so that the last step is a rename within one file system.
    """
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, staging = tempfile.mkstemp(prefix=f".{os.path.basename(path)}-", dir=os.path.dirname(path))
    os.close(handle)
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(staging, 0o666 & ~umask)  # mkstemp's are for their owner alone
        yield staging
        with open(staging, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut leaves the name with nothing behind it
        os.replace(staging, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(staging)
        raise


def write_json(path, content):
    """Write `content` as indented JSON, whole or not at all."""
    with replacing(path) as staging, open(staging, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
