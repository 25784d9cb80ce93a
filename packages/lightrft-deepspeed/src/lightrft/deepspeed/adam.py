"""AdamW for ZeRO: torch's, or with ``--adam_offload`` DeepSpeed's for the host, if it can be compiled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from .environment import load_deepspeed


def lacking_for_cpu_adam(
    which: Callable[[str], str | None] = shutil.which, environ: Mapping[str, str] = os.environ
) -> str | None:
    """What this machine lacks to build DeepSpeedCPUAdam, or None if nothing is missing.

    torch builds extensions with ``$CXX`` (or c++) and ninja.
    """
    compiler = environ.get("CXX", "c++")
    if which(compiler) is None:
        return f"a C++ compiler ({compiler})"
    return "ninja" if which("ninja") is None else None


def make_adamw(
    groups: list[dict[str, Any]], options: Mapping[str, Any], *, on_host: bool, say: Callable[[str], None]
) -> Optimizer:
    """AdamW over ``groups``; on the host DeepSpeed's compiled one, else torch's, which computes the same.

    :param options: AdamW's keywords. :param say: called with the reason if torch's AdamW steps on the host.
    """
    if on_host:
        load_deepspeed()
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        lacking = None if installed_ops.get("cpu_adam") else lacking_for_cpu_adam()
        if lacking is None:
            try:
                return DeepSpeedCPUAdam(groups, **options)
            except RuntimeError as error:  # it says only that the build failed; its cause says why
                lacking = f"a working build ({error.__cause__ or error})"
        say(f"--adam_offload: DeepSpeedCPUAdam needs {lacking}; torch's AdamW steps on the host instead, to the same")
    return torch.optim.AdamW(groups, **{"fused": True, **options})
