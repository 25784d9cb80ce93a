"""Import DeepSpeed so that it runs where we run: on a CPU too, without a compiler, and without its banner."""

from __future__ import annotations

import logging
import os
import weakref
from functools import cache
from types import ModuleType

import torch
import torch.distributed as dist


@cache
def load_deepspeed() -> ModuleType:
    """DeepSpeed's module, set up once.

    On a CPU it would build a shared-memory collective with a C++ compiler as soon as it joins the process group, and
    die where there is none; gloo does without.
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
    return deepspeed


def join_process_group() -> None:
    """Let DeepSpeed use the process group that torch has now.

    It keeps a clone of the first one that it saw; where torch's was destroyed and made anew, that clone is forgotten.
    """
    deepspeed = load_deepspeed()
    from deepspeed.utils import groups

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asserts it, also for a plain `python script.py`
    current = dist.distributed_c10d._get_default_group()
    if _seen and _seen[0]() is not current:
        groups._release_process_group_references(group=None)
        deepspeed.comm.comm.cdb = None
    _seen[:] = [weakref.ref(current)]
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False, verbose=False)


_seen: list[weakref.ref[dist.ProcessGroup]] = []
