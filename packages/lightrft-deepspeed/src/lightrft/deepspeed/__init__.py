"""DeepSpeed ZeRO 1, 2 and 3 as a LightRFT strategy."""

from __future__ import annotations

from .ds_config import get_ds_eval_config, get_ds_train_config
from .strategy import DeepspeedStrategy

__all__ = ["DeepspeedStrategy", "get_ds_eval_config", "get_ds_train_config"]
