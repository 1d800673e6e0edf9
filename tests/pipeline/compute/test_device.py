import threading

import numba
import pytest
import torch

from pipeline.compute.device import choose_device, context_is_broken, set_threads, share_threads
from pipeline.errors import ConfigError


def test_every_thread_that_computes_keeps_to_the_limit() -> None:
    """numba's limit is that of the calling thread: set once in a constructor, it did not hold in Ray's threads."""
    seen: list[tuple[int, int]] = []

    def compute() -> None:
        set_threads(1, 1)
        seen.append((numba.get_num_threads(), torch.get_num_threads()))

    for _ in range(2):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    assert seen == [(1, 1), (1, 1)]


def test_cores_are_shared_among_the_processes_of_one_machine() -> None:
    alone = share_threads(None, 1)
    assert share_threads(None, 2) == max(1, alone // 2)
    assert share_threads(None, 10_000) == 1
    assert share_threads(3, 8) == 3


def test_the_device_follows_the_option() -> None:
    """Ray does not hide GPUs from actors that ask for none."""
    assert choose_device(0) == torch.device("cpu")
    if torch.cuda.is_available():
        assert choose_device(None).type == choose_device(1).type == "cuda"
    else:
        assert choose_device(None) == torch.device("cpu")
        with pytest.raises(ConfigError, match="sees none") as error:
            choose_device(1)
        assert "--gpus-per-actor 0" in str(error.value)


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("CUDA error in a path"), False),
    ],
)
def test_any_cuda_error_but_out_of_memory_breaks_the_context(error: Exception, broken: bool) -> None:
    assert context_is_broken(error) is broken
    wrapped = RuntimeError("the kernel failed")
    wrapped.__cause__ = error
    assert context_is_broken(wrapped) is broken
