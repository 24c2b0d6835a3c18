"""How a step's samples are cut into micro-batches, and what counts as running out of memory."""

import gc

import torch

from tracknet.errors import UserError
from tracknet.schema.training import TrainingConfig

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


class MicroBatchSize:
    """Samples per micro-batch: starts at `micro_batch_size` (0: the whole batch) and only falls, the same on all ranks."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self.value = config.micro_batch_size or config.batch_size

    def back_off(self, retries: int) -> None:
        """A smaller size after memory ran out at the present one.

        Args:
            retries: how often this step was tried again already.

        Raises:
            UserError: the settings allow no further attempt; the message says what to lower.
        """
        config, failed = self._config, self.value
        at_failure = f"out of memory at micro-batches of {failed}"
        if not config.adaptive_micro_batch:
            raise UserError(f"{at_failure}; lower training.micro_batch_size, or set training.adaptive_micro_batch=true")
        if retries >= config.oom_retries:
            raise UserError(
                f"{at_failure} after {retries} retries (training.oom_retries={config.oom_retries});"
                f" start lower with training.micro_batch_size, or allow more retries"
            )
        if failed <= config.min_micro_batch_size:
            raise UserError(
                f"{at_failure}, the smallest that training.min_micro_batch_size={config.min_micro_batch_size} allows;"
                " lower it if it is above 1, else data.sequence.length, data.preprocess.resize, data.augment.crop or the model"
            )
        self.value = max(config.min_micro_batch_size, failed // config.mb_backoff_factor)
