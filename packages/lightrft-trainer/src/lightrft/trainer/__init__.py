"""SPMDPPOTrainer and its parts: advantages, losses, rollout to experience, the loop."""

from __future__ import annotations

from .experience import Experience, ExperienceBatch
from .experience_maker import ExperienceMaker
from .kl_controller import AdaptiveKLController, FixedKLController
from .policy_update import PolicyUpdater
from .replay_buffer import ReplayBuffer
from .spmd_ppo_trainer import DriftError, SPMDPPOTrainer
from .spmd_ppo_trainer_vl import SPMDPPOTrainerVL

__all__ = [
    "SPMDPPOTrainer",
    "SPMDPPOTrainerVL",
    "DriftError",
    "Experience",
    "ExperienceBatch",
    "ExperienceMaker",
    "PolicyUpdater",
    "ReplayBuffer",
    "FixedKLController",
    "AdaptiveKLController",
]
