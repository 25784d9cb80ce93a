"""The trainer for vision-language models: prompts may have images, which are passed to the engine and every forward
pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightrft.strategy.sampling import SamplingParams

from .experience import Experience
from .experience_maker import ExperienceMaker
from .spmd_ppo_trainer import SPMDPPOTrainer

if TYPE_CHECKING:
    from lightrft.strategy.engine import GenerationOutput

# Outputs of an image processor that a model's forward pass takes.
IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes")


class ExperienceMakerVL(ExperienceMaker):
    """Sends text and images to the engine, and keeps the processor's output for training."""

    def generate(self, prompts: Sequence[Any], sampling: SamplingParams, step: int) -> list[GenerationOutput]:
        """See the base class. The engine expands image placeholders; training uses its prompt ids.

        It gets the dataset's ids, not the text: tokenizing the text again could add special tokens that its chat
        template has added already.
        """
        images = [list(prompt.images or ()) for prompt in prompts]
        return self.strategy.gather_and_generate(
            sampling,
            all_prompt_token_ids=[prompt.prompt_token_ids for prompt in prompts],
            all_images=[picture for pictures in images for picture in pictures],
            images_num=[len(pictures) for pictures in images],
            sleep_engine=False,
            prompt_indices=[prompt.index for prompt in prompts],
            step=step,
        )

    def to_sample(self, output: GenerationOutput, prompt: Any) -> Experience:
        """See the base class; the samples of one prompt share their image tensors."""
        sample = super().to_sample(output, prompt)
        sample.images = self._image_inputs(prompt)
        return sample

    def _draw_groups(self, prompts: Sequence[Any], step: int, round_: int, rollout: Any) -> Any:
        self._processed: dict[int, dict[str, torch.Tensor]] = {}
        return super()._draw_groups(prompts, step, round_, rollout)

    def _image_inputs(self, prompt: Any) -> dict[str, torch.Tensor]:
        if not prompt.images:
            return {}
        cache = getattr(self, "_processed", {})
        if prompt.index not in cache:
            made = self.processor.image_processor(images=list(prompt.images), return_tensors="pt")
            cache[prompt.index] = {name: made[name] for name in IMAGE_INPUTS if name in made}
        return cache[prompt.index]


class SPMDPPOTrainerVL(SPMDPPOTrainer):
    """:class:`SPMDPPOTrainer` for vision-language models; takes the same arguments, and ``processor`` as well."""

    multimodal = True
    experience_maker_class = ExperienceMakerVL

    def _problems(self) -> list[str]:
        found = super()._problems()
        if self.processor is None:
            found.append("a vision-language trainer needs the model's processor; pass processor=AutoProcessor...")
        return found
