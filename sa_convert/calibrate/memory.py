"""How much memory this process has needed."""

import sys


def peak_memory() -> int:
    """Bytes that were resident at most since the process began, and those that CUDA devices held at most."""
    import resource

    import torch

    # Kibibytes on Linux, bytes on macOS.
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return size + sum(torch.cuda.max_memory_allocated(device) for device in devices)
