"""What this machine can do: device, dtypes, threads, memory, and how fast it reads.

Decoding one token reads every weight once, so `bytes of weights / read bandwidth` is its floor, and the share of the
bandwidth that a run reaches (MBU, model bandwidth utilisation) says how much is left to gain.

    python -m bench.ceilings
"""

import ctypes
import os
import resource
import shutil
import statistics
import sys
import time
from functools import cache
from pathlib import Path

import torch

from errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" | "cpu" | "cuda" | "cuda:1" -> a device that is there, or UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            raise UserError(f"device {name!r} asked for, but this machine has {count} CUDA devices; use --device cpu")
    return device


def pick_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's own dtype where the device computes in it natively, else float32.

    UserError for a dtype that the device has no instructions for.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return stored if _computes_in(stored, device) else torch.float32
    if name not in dtypes:
        raise UserError(f"dtype {name!r} is unknown; these are: auto, {', '.join(dtypes)}")
    if not _computes_in(dtypes[name], device):
        raise UserError(f"this {device.type} has no {name} arithmetic; use --dtype float32")
    return dtypes[name]


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use for CPU code, or None."""
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("clang++")


def cache_dir() -> Path:
    """Where what is worth keeping between runs lies: compiled code. FOLIO_CACHE_DIR overrides it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FOLIO_CACHE_DIR") or Path(base) / "folio")


def read_bandwidth(device: torch.device, mebibytes: int = 256, repeats: int = 5) -> float:
    """Bytes per second at which this device reads memory, all threads: a sum over more than any cache holds."""
    x = torch.ones(mebibytes << 18, dtype=torch.float32, device=device)
    times = []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        x.sum()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return x.numel() * 4 / statistics.median(times[1:])


def threads(device: torch.device) -> int:
    """CPU threads that compute: torch's own choice, one a core, unless OMP_NUM_THREADS says otherwise. 1 beside a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def release_openmp_team() -> None:
    """End the OpenMP threads that belong to the calling thread; its next parallel operator starts new ones.

    GNU OpenMP lets idle threads spin only while all teams of a process together have no more threads than there are cores.
    One that stays behind where a model was loaded makes every operator of another thread wait for the kernel: the
    bundled model decodes at half the speed then.
    """
    if (library := _gnu_openmp()) is not None:
        library.omp_pause_resource_all(2)  # omp_pause_hard


@cache
def _gnu_openmp() -> ctypes.CDLL | None:
    """The libgomp that torch has loaded; None where it uses another one."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    path = next((line.split()[-1] for line in lines if "libgomp" in line), None)
    library = ctypes.CDLL(path) if path is not None else None
    return library if hasattr(library, "omp_pause_resource_all") else None


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has had: resident on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss starts at the size of the process that started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
