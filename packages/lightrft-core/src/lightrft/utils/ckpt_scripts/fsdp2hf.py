"""From an FSDP2 checkpoint to a Hugging Face folder: ``python -m lightrft.utils.ckpt_scripts.fsdp2hf IN OUT``."""

from __future__ import annotations

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main("fsdp", "hf"))
