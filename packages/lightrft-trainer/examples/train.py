"""Train a language model. The same as ``lightrft train``: starts its own ranks, or is one of torchrun's.

python train.py --fsdp --engine_type hf --pretrain MODEL --prompt_data DATA.jsonl --reward exact_match
torchrun --nproc_per_node 8 train.py --zero_stage 2 --engine_tp_size 4 --pretrain MODEL --prompt_data DATA.jsonl ...
"""

from __future__ import annotations

import sys

from lightrft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
