"""What machine a time was measured on."""

import os
import pathlib
import platform

__all__ = ["describe"]

_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "asimd", "sve")


def describe():
    """Return the processor, its vector instructions, the count of cores and the system, as far as it tells."""
    processor, flags = platform.processor(), []
    if os.path.exists("/proc/cpuinfo"):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
        listed = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
        flags = [flag for flag in _FLAGS if flag in listed]
    return {"processor": processor, "flags": flags, "cores": os.cpu_count(), "system": platform.platform()}
