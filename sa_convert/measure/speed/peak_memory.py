"""The peak memory of this process, from a moment on."""

import gc
import sys
from pathlib import Path

from sa_convert.console.progress import peak_memory

RESIDENT = "resident memory of the process"
SINCE_START = "resident memory of the process since its start, loading included"
ALLOCATED = "memory allocated on the device"


class PeakMemory:
    """What is measured is called `kind`: on CUDA what torch has allocated; elsewhere the memory of the process, of
    which Linux can forget the peak so far. If it may not, the peak is that since the start of the process."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.kind = ALLOCATED if device.startswith("cuda") else RESIDENT if _forget_peak() else SINCE_START

    def reset(self) -> None:
        """Begin here, after memory that is free has been given back."""
        import torch

        gc.collect()
        if self.kind == ALLOCATED:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        _give_back()
        if self.kind == RESIDENT:
            _forget_peak()

    def read(self) -> int:
        """Bytes."""
        if self.kind == ALLOCATED:
            import torch

            return torch.cuda.max_memory_allocated(self._device)
        return _resident_peak() if self.kind == RESIDENT else peak_memory()


def _forget_peak() -> bool:
    """Let the kernel count the peak of resident memory from now on. Whether it does: not in every container."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")
        _resident_peak()
    except (OSError, StopIteration):
        return False
    return True


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _give_back() -> None:
    """What the C library holds of freed memory would count as memory of whatever runs next."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
