"""Every way of saying that memory ran out is known, and nothing else is taken for one."""

import errno
import gc
import resource
import sys
import weakref

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracknet.errors import ConfigError, UserError
from tracknet.out_of_memory import is_out_of_memory, peak_memory_gb, release_memory

CUDA_HINT = "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3699, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9"

# what was read in a library was read in the one that torch 2.15+cu132 installs
TEXTS = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB",  # libc10_cuda.so
    "CUDA out of memory. Allocation was preemptively rejected because it would exceed per_process_memory_fraction limit.",  # the same
    "CUDA error: out of memory",  # libcudart.so.13: the text of cudaErrorMemoryAllocation, behind torch's "CUDA error: "
    "CUDA error: out of memory" + CUDA_HINT,
    "CUDA driver error: out of memory",  # ATen/cuda/Exceptions.h, AT_CUDA_DRIVER_CHECK
    "Allocation on device 0 would exceed allowed memory. (out of memory)",  # libc10_cuda.so, cudaMallocAsync
    "cuDNN SDPA execution failed with error code 8: err 2\nCUDA ran out of memory outside PyTorch's allocator.",  # libtorch_cuda.so
    "cuDNN Frontend error: cudaErrorMemoryAllocation",  # the names that torch looks for there
    "cuDNN Frontend error: CUDA_ERROR_OUT_OF_MEMORY",
    "Triton Error [CUDA]: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",  # libtorch_cuda.so; ATen/cuda/Exceptions.h
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",  # cuDNN 8
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",  # libcudnn_graph.so.9
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # the same
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",  # the same
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",  # libtorch_cuda.so
    "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",  # libcusparse.so.12
    "cuFFT error: CUFFT_ALLOC_FAILED",  # libtorch_cuda.so
    "MAGMA: cannot allocate memory on GPU device",  # libtorch_cuda_linalg.so
    "HIP out of memory. Tried to allocate 2.00 MiB. GPU 7 has a total capacity of 287.98 GiB",  # pytorch/pytorch#175431
    "HIP error: out of memory",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",  # ROCm/TheRock#1708
    "miopenStatusAllocFailed",  # MIOpen's miopen.h
    "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 384.00 KB, max allowed: 9.07 GB).",  # MPSAllocator.mm
    "Invalid buffer size: 24.02 GB",  # MPSAllocator.mm, a tensor above the largest buffer of the device
    NCCL + "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc 10485760 bytes",  # libnccl.so.2
    NCCL + "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 2432 bytes",
    NCCL + "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA malloc 4194304 bytes",
    NCCL + "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA host alloc 4096 bytes",
    NCCL + "\nncclSystemError: System call (e.g. socket, malloc) failed.\nLast error:\nFailed to malloc 4096 bytes",
    NCCL + "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",  # openxla/xla#7201
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] writev [127.0.0.1]:10119: Cannot allocate memory",  # ENOMEM's text
    "std::bad_alloc",  # torch/csrc/Exceptions.h turns any std::exception into a RuntimeError
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.",  # libc10.so
    "DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes.",  # c10/core/impl/alloc_cpu.cpp, Windows
    "could not create a primitive",  # oneDNN; seen of conv2d and linear under RLIMIT_AS
    "could not execute a primitive",  # oneDNN; seen of conv2d under RLIMIT_AS
    "could not create a memory object",  # oneDNN's dnnl.hpp
]

OTHER_TEXTS = [
    "mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)",
    "The size of tensor a (4) must match the size of tensor b (5) at non-singleton dimension 1",
    "CUDA error: an illegal memory access was encountered" + CUDA_HINT,
    "CUDA error: device-side assert triggered" + CUDA_HINT,
    "CUDA error: misaligned address" + CUDA_HINT,
    "CUDA error: too many resources requested for launch",
    "CUDA error: unspecified launch failure",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
    "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasSgemm(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_UNEXPECTED_VALUE",
    "GET was unable to find an engine to execute this computation",
    "Triton Error [CUDA]: out of resource: shared memory, Required: 180224, Hardware limit: 101376",
    "could not create a primitive descriptor for the convolution forward propagation primitive. Run workload with environment variable"
    " ONEDNN_VERBOSE=all to get additional diagnostic information.",
    "could not create a memory descriptor from blob",
    NCCL.replace("cuda error", "system error") + "\nncclSystemError: System call failed.\nLast error:\nConnection refused",
    NCCL + "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 1 'invalid argument'",
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600012 ms",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:10119",
    "Expected to have finished reduction in the prior iteration before starting a new one.",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory.",
    "NNPACK: without memory",
    "Invalid buffer size: 7",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_an_allocation_that_failed_is_known_by_its_text(text):
    assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(RuntimeError("Caught an error on device 1\n" + text + "\n"))


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_another_failure_is_not_taken_for_one(text):
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, UserError, ConfigError, FileNotFoundError, AssertionError, Exception])
def test_the_words_alone_are_not_enough(kind):
    assert not is_out_of_memory(kind("cannot read 'CUDA out of memory. Tried to allocate.mp4'"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),  # seen of gloo's all-reduce under RLIMIT_AS
        torch.OutOfMemoryError("any text"),
        torch.AcceleratorError("CUDA error: out of memory" + CUDA_HINT),
        torch.distributed.DistBackendError(NCCL + "\nLast error:\nFailed to CUDA calloc 10485760 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_the_kinds_that_torch_and_python_raise_count(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EACCES, "out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RecursionError("maximum recursion depth exceeded"),
        KeyboardInterrupt(),
        UserError("step 3: out of memory in the optimizer's update"),
    ],
)
def test_other_kinds_do_not(error):
    assert not is_out_of_memory(error)


@given(st.text())
def test_arbitrary_text_does_not_count(text):
    assert not is_out_of_memory(RuntimeError(text))


PHRASES = ["out of memory", "failed to cuda calloc", "could not create a primitive"]
WORDS = [*dict.fromkeys(" ".join(PHRASES).split()), "descriptor", "shared", "access", "error:"]


@given(st.lists(st.sampled_from(WORDS), max_size=12) | st.permutations(WORDS))
def test_the_words_of_the_phrases_count_in_their_order_alone(words):
    text = " ".join(words)
    says_so = f" {text} ".lower().replace("primitive descriptor", "other")
    assert is_out_of_memory(RuntimeError(text)) == any(f" {phrase} " in says_so for phrase in PHRASES)


@given(st.text(), st.sampled_from(TEXTS), st.text())
def test_the_phrases_count_wherever_they_stand_on_lines_of_their_own(before, text, after):
    assert is_out_of_memory(RuntimeError(f"{before}\n{text}\n{after}"))


def raised(action) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the test is which exception it is)
        action()
    return caught.value


def test_real_allocators_fail_in_a_way_that_is_known():
    assert is_out_of_memory(raised(lambda: torch.empty(2**56, dtype=torch.uint8)))
    assert is_out_of_memory(raised(lambda: np.empty(2**56, dtype=np.uint8)))
    assert is_out_of_memory(raised(lambda: bytearray(2**56)))


def test_real_errors_of_shape_type_and_file_are_not():
    assert not is_out_of_memory(raised(lambda: torch.ones(2, 3) @ torch.ones(2, 3)))
    assert not is_out_of_memory(raised(lambda: torch.nn.Conv2d(3, 4, 3)(torch.ones(1, 5, 8, 8))))
    assert not is_out_of_memory(raised(lambda: torch.ones(2).reshape(3)))
    assert not is_out_of_memory(raised(lambda: torch.tensor(2**70)))
    assert not is_out_of_memory(raised(lambda: torch.load("out of memory.pt")))


def test_an_error_raised_from_a_failed_allocation_counts_and_one_that_merely_followed_it_does_not():
    def wrapped():
        try:
            raise MemoryError
        except MemoryError as error:
            raise ValueError("the backbone failed") from error

    def followed():
        try:
            raise MemoryError
        except MemoryError:
            {}["key"]

    assert is_out_of_memory(raised(wrapped))
    assert not is_out_of_memory(raised(followed))


def test_a_message_for_the_user_is_never_retried_whatever_caused_it():
    refused, outer = UserError("out of memory in the optimizer's update"), RuntimeError("the step failed")
    refused.__cause__, outer.__cause__ = MemoryError(), refused
    assert not is_out_of_memory(refused)
    assert not is_out_of_memory(outer)


def test_a_ring_of_causes_ends():
    first, second = RuntimeError("one"), RuntimeError("two")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


def test_what_only_the_collector_can_free_is_released():
    class Node:
        """Holds itself."""

    node = Node()
    node.ring, alive = node, weakref.ref(node)
    gc.disable()
    try:
        del node
        assert alive() is not None
        release_memory(torch.device("cpu"))
        assert alive() is None
    finally:
        gc.enable()


def test_the_cache_of_the_device_is_emptied(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
    for device in ("cuda", "mps", "cpu"):
        release_memory(torch.device(device))
    assert emptied == ["cuda", "mps"]


def test_the_peak_of_a_process_is_no_less_than_what_it_holds_and_never_falls():
    before = peak_memory_gb(torch.device("cpu"))
    block = np.ones(100_000_000, dtype=np.uint8)
    held = psutil.Process().memory_info().rss / 1e9
    del block
    after = peak_memory_gb(torch.device("cpu"))
    assert after >= before
    assert held * 0.99 <= after <= psutil.virtual_memory().total / 1e9


def test_the_peak_is_in_billions_of_bytes_on_every_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2_000_000_000)
    assert peak_memory_gb(torch.device("cuda")) == 3.0
    assert peak_memory_gb(torch.device("mps")) == 2.0
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "linux")
    on_linux = peak_memory_gb(torch.device("cpu"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert on_linux == 1024 * peak_memory_gb(torch.device("cpu")) == usage.ru_maxrss * 1024 / 1e9
