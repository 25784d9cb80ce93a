"""From a Hugging Face folder to an FSDP2 checkpoint: ``python -m lightrft.utils.ckpt_scripts.hf2fsdp IN OUT``."""

from __future__ import annotations

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main("hf", "fsdp"))
