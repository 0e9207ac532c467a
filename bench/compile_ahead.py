"""Compile Triton kernels for GPUs that this machine does not have, and read the machine code.

Triton brings all its compilers along; what it asks of a driver is which chip there is. So a stand-in driver names one,
and within `compiling(arch)` every launch `kernel[grid](...)` compiles for it and returns. The kernels' own Python
wrappers run as they would on that GPU and choose their configurations, on CPU tensors: of a tensor Triton looks at
dtype and alignment alone, of an integer at whether it is 1 or a multiple of 16. What comes out is thus what a launch
would run, and Triton's cache keeps it.

    with compiling("sm90") as kernels:
        paged_decode(...)
    print(*kernels, sep="\n")

Triton compiles what does not fit a chip without a word: compare `shared` with the chip's. Not in a process that
interprets: TRITON_INTERPRET changes Triton's language for good.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import paged


@dataclass(frozen=True)
class Chip:
    """Of one multiprocessor, as far as it limits how many programs run on it side by side."""

    target: GPUTarget
    processors: int
    shared: int  # bytes that one program may have
    reserved: int  # bytes that the system takes of each program's
    registers: int  # of 32 bits
    threads: int = 2048


CHIPS = {
    "sm80": Chip(GPUTarget("cuda", 80, 32), 108, 163 * 1024, 1024, 65536),
    "sm90": Chip(GPUTarget("cuda", 90, 32), 132, 227 * 1024, 1024, 65536),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 304, 64 * 1024, 0, 131072),
}
# Matrix products (wgmma, mma.sync, AMD's), copies to shared memory that run on the side (cp.async), fused products.
COUNTED = ("HGMMA", "HMMA", "MFMA", "LDGSTS", "FFMA")


@dataclass(frozen=True)
class Kernel:
    """What one launch would run."""

    hash: str  # of Triton's cache: equal for launches of the same code
    arch: str
    name: str
    constants: dict[str, int]  # its integer constants: tile sizes and the like
    warps: int
    stages: int
    shared: int  # bytes of a program
    registers: int  # of a thread
    stack: int  # bytes of a thread
    spills: int  # instructions that move registers to memory or back; on AMD the registers that are moved
    loop_spills: int  # those of them inside a loop; not told on AMD
    instructions: dict[str, int]  # of those COUNTED that occur

    @property
    def programs(self) -> int:
        """That fit a multiprocessor side by side; 0: it cannot run at all."""
        chip = CHIPS[self.arch]
        if self.shared > chip.shared:
            return 0
        threads = self.warps * chip.target.warp_size
        registers = max(8, -(-self.registers // 8) * 8) * threads
        by_shared = (chip.shared + chip.reserved) // max(1, self.shared + chip.reserved)
        return min(chip.threads // threads, chip.registers // registers, by_shared)


@contextmanager
def compiling(arch: str) -> Iterator[list[Kernel]]:
    """Turn launches into compilations for `arch`, one of CHIPS; the list receives a Kernel for each of them."""
    if paged.INTERPRETED:
        raise RuntimeError("Triton interprets in this process, which then compiles nothing: unset TRITON_INTERPRET")
    kernels: list[Kernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args, grid, warmup, **kwargs) -> CompiledKernel:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in _read:
            _read[compiled.hash] = read(arch, compiled, {k: v for k, v in kwargs.items() if isinstance(v, int)})
        kernels.append(_read[compiled.hash])
        return compiled

    before = driver._active
    driver.set_active(StandIn(arch))
    try:
        with (
            patch.object(JITFunction, "run", compile_only),
            patch.object(paged, "device_of", lambda index: (arch, CHIPS[arch].processors)),
            patch.object(paged, "INTERPRETED", True),  # let the wrappers take CPU tensors
        ):
            yield kernels
    finally:
        driver._active = before


_read: dict[str, Kernel] = {}  # by hash: many launches are of one kernel


class StandIn:
    """As much of a driver as a compilation needs."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_device(self) -> int:
        return list(CHIPS).index(self.arch)  # Triton keeps kernels by this number: each chip needs its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.arch].target


def read(arch: str, compiled: CompiledKernel, constants: dict[str, int]) -> Kernel:
    meta = compiled.metadata
    costs = read_amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else read_nvidia(compiled.asm["cubin"])
    return Kernel(compiled.hash, arch, meta.name, constants, meta.num_warps, meta.num_stages, meta.shared, *costs)


def read_nvidia(cubin: bytes) -> tuple[int, int, int, int, dict[str, int]]:
    """-> registers, stack, spills, loop_spills, instructions.

    What ptxas logs of spills is lost with the cache; LDL and STL stay. A loop is what a branch jumps back over.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", code)[1]) for name in ("REG", "STACK"))
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    spills = [at for at, text in lines if re.search(r"\b(?:LDL|STL)\b", text)]
    jumps = [(int(to[1], 16), at) for at, text in lines if (to := re.search(r"\bBRA\b.* (0x[0-9a-f]+)", text))]
    in_loops = [at for at in spills if any(to <= at <= jump for to, jump in jumps)]
    return registers, stack, len(spills), len(in_loops), count(code)


def read_amd(assembly: str) -> tuple[int, int, int, int, dict[str, int]]:
    """-> registers, stack, spills, 0, instructions."""
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    numbers = (int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1]) for name in names)
    return *numbers, 0, count(assembly.replace("v_mfma_", "MFMA "))


def count(code: str) -> dict[str, int]:
    found = {name: len(re.findall(rf"\b{name}\b", code)) for name in COUNTED}
    return {name: times for name, times in found.items() if times}
