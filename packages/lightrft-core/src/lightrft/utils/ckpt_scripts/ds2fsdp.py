"""From a DeepSpeed checkpoint to an FSDP2 checkpoint: ``python -m lightrft.utils.ckpt_scripts.ds2fsdp IN OUT``."""

from __future__ import annotations

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main("ds", "fsdp"))
