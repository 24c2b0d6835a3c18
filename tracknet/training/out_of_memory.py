"""What counts as running out of memory, and how it is given back."""

import gc
import resource
import sys

import torch

OUT_OF_MEMORY_TEXTS = (
    "out of memory",  # CUDA and MPS allocators, "CUDA error: out of memory", hipErrorOutOfMemory
    "can't allocate memory",  # the CPU allocator of torch, "DefaultCPUAllocator: can't allocate memory"
    "could not create a primitive",  # oneDNN
    "could not create a memory object",  # oneDNN
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",  # what cuDNN says when its workspace cannot be had
    "Failed to CUDA calloc",  # NCCL
    "Cannot allocate memory",  # the operating system's ENOMEM, as gloo passes it on
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device; a shape error, say, does not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text.lower() in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


def release_memory(device: torch.device) -> None:
    """Gives back what the failed attempt left behind; to be called outside the `except` block, whose traceback keeps the tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that was in use so far, in 1e9 bytes: on the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
