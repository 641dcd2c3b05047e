"""The two halves of guidance at the same time, each on half of the CPU's cores.

When every operation is shared out over all cores, each of the thousands in a step ends with the faster core waiting
for the slower one, and what one core has written the other reads next. The two halves need nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cdvideo.motion.video_unet import Apart
from cdvideo.sampling.prompt_kv import reading_half


@contextmanager
def two_halves(device: torch.device) -> Iterator[Apart | None]:
    """Within the block, what calls a function twice at once, and concatenates; None where that gains nothing.

    Each call reads its half of the compiled prompts. Modes that look on as torch computes (counting operations,
    tensors without data) see one thread alone, so under them there is none.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or is_in_torch_dispatch_mode():
        yield None
        return

    @torch.inference_mode()
    def compute(half: Callable[[], Tensor], index: int) -> Tensor:
        with reading_half(index):
            return half()

    try:
        with ThreadPoolExecutor(2, "half", torch.set_num_threads, (threads // 2,)) as pool:
            yield lambda half: torch.cat(list(pool.map(compute, (half, half), (0, 1))))
    finally:
        torch.set_num_threads(threads)  # some of its libraries keep one number for all threads
