"""What counts as running out of memory, and how it is given back."""

import errno
import gc
import re
import resource
import sys

import torch

from tracknet.errors import UserError

# Read in torch 2.15, its libraries and the CUDA 13 ones; or seen to be raised under a limit of the address space.
OUT_OF_MEMORY_TEXTS = (
    # the allocators of CUDA, HIP and MPS; "CUDA error: out of memory" of the runtime, with or without a final dot; NCCL's
    # "Cuda failure 2 'out of memory'"; CUDA_ERROR_OUT_OF_MEMORY of the driver
    r"(?<![a-z])out[ _]of[ _]memory(?![a-z_])",
    r"cudaErrorMemoryAllocation",  # cuDNN's front end passes on the name instead of the text
    r"\b(?:CU|HIP)[A-Z]+(?:_STATUS)?_ALLOC_FAILED\b",  # cuBLAS, cuDNN up to 8, cuSOLVER, cuSPARSE, cuFFT, and the same of HIP
    r"\bmiopenStatusAllocFailed\b",
    # cuDNN says this of a workspace that it could not have, but of other faults too. Those cost a few attempts: each of them halves the
    # micro-batch, and training.oom_retries and training.min_micro_batch_size end them with an error. Its newer names say which it is.
    r"\bCUDNN_STATUS_INTERNAL_ERROR(?:_(?:DEVICE|HOST)_ALLOCATION_FAILED)?\b",
    r"\bfailed to CUDA (?:calloc|malloc|host alloc)\b",  # NCCL, behind "Last error:"
    r"\bfailed to malloc \d+ bytes",  # NCCL
    r"\bInvalid buffer size: [\d.]+ [KMGT]i?B",  # MPS, of one tensor above what a Metal buffer can hold
    r"\bcan(?:'t|not) allocate memory",  # torch's DefaultCPUAllocator; ENOMEM as gloo and mmap pass it on; MAGMA
    r"\bDefaultCPUAllocator: not enough memory",  # the same allocator on Windows
    r"\bbad_alloc\b",  # of C++, where a binding makes it a RuntimeError; gloo's buffers come as a MemoryError
    # oneDNN. A "primitive descriptor" that cannot be created is an unsupported shape or type, not a lack of memory.
    r"\bcould not create a primitive(?! descriptor)",
    r"\bcould not execute a primitive\b",
    r"\bcould not create a memory object\b",
)
_ANY_TEXT = re.compile("|".join(OUT_OF_MEMORY_TEXTS), re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on any device; a shape error, say, does not.

    An exception that was raised `from` such a one counts as well; one that merely came up while another was handled does not, nor does a
    `UserError`, whose cause has been dealt with.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen and not isinstance(link, UserError):
        if _is_failed_allocation(link):
            return True
        seen.add(id(link))
        link = link.__cause__
    return False


def _is_failed_allocation(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # the text decides only where libraries leave no other sign: a KeyError may quote a file name
    return isinstance(error, RuntimeError) and _ANY_TEXT.search(str(error)) is not None


def release_memory(device: torch.device) -> None:
    """Gives back what the failed attempt left behind; to be called outside the `except` block, whose traceback keeps the tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that was in use so far, in 1e9 bytes: tensors on a CUDA device, else what is resident of this process.

    MPS keeps no peak; there it is what the driver holds now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
