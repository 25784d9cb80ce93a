"""Train a vision-language model. The same as ``lightrft train-vl``: starts its own ranks, or is one of torchrun's.

python train_vl.py --fsdp --engine_type hf --pretrain MODEL --prompt_data DATA.jsonl --reward exact_match
"""

from __future__ import annotations

import sys

from lightrft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train-vl", *sys.argv[1:]]))
