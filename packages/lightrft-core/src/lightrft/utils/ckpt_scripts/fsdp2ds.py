"""From an FSDP2 checkpoint to a DeepSpeed checkpoint: ``python -m lightrft.utils.ckpt_scripts.fsdp2ds IN OUT``."""

from __future__ import annotations

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main("fsdp", "ds"))
