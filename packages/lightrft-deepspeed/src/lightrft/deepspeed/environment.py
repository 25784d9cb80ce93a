"""Import DeepSpeed so that it also runs on a CPU, without a compiler, and without its banner."""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from lightrft.strategy.errors import ConfigError


@cache
def load_deepspeed() -> ModuleType:
    """DeepSpeed's module, set up once.

    On a CPU it would build a shared-memory collective with a C++ compiler when it joins the process group, and fail if
    there is none; gloo does not need it.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed import ops

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed calls old names of torch's, several in each step, and torch warns each time.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


def require_dtype(dtype_name: str) -> None:
    """Refuse a precision that DeepSpeed does not support on this device.

    :raises ConfigError: fp16 on a CPU without fp16 instructions, and the like.
    """
    load_deepspeed()
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if dtype_name == "float16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            [f"--fp16: DeepSpeed does not support it on this {accelerator.device_name()}; use --bf16, or --fsdp"]
        )
    if dtype_name == "bfloat16" and not accelerator.is_bf16_supported():
        raise ConfigError(
            [f"--bf16: DeepSpeed does not support it on this {accelerator.device_name()}; use --fp16, or --fsdp"]
        )


def make_secondary_group(ranks: int) -> None:
    """Make the groups of ``--zpg``, once.

    DeepSpeed 0.19 makes them for a model that trains, but calls a missing method for a frozen one.
    """
    load_deepspeed()
    from deepspeed.utils import groups

    if groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(ranks)


def join_process_group() -> None:
    """Let DeepSpeed use torch's present process group.

    It keeps a clone of the first one; if torch's was destroyed and made again, that clone is dropped.
    """
    deepspeed = load_deepspeed()
    from deepspeed.utils import groups

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed needs it even for a plain `python script.py`
    current = dist.distributed_c10d._get_default_group()
    if _seen and _seen[0]() is not current:
        groups._release_process_group_references(group=None)
        deepspeed.comm.comm.cdb = None
    _seen[:] = [weakref.ref(current)]
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False, verbose=False)


_seen: list[weakref.ref[dist.ProcessGroup]] = []
