"""The trainer for vision-language models: prompts may have images, which are passed to the engine and every forward
pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightrft.strategy.image_inputs import process_images
from lightrft.strategy.sampling import SamplingParams

from .experience import Experience
from .experience_maker import ExperienceMaker
from .spmd_ppo_trainer import SPMDPPOTrainer

if TYPE_CHECKING:
    from lightrft.strategy.engine import GenerationOutput


class ExperienceMakerVL(ExperienceMaker):
    """Sends text and images to the engine, and keeps the processor's output for training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._processed: tuple[Any, dict[str, torch.Tensor]] = (None, {})  # the last prompt and its images

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
        """See the base class; the samples of one prompt, which follow each other, share their image tensors."""
        sample = super().to_sample(output, prompt)
        sample.images = self._image_inputs(prompt)
        return sample

    def _image_inputs(self, prompt: Any) -> dict[str, torch.Tensor]:
        if not prompt.images:
            return {}
        if self._processed[0] is not prompt:
            self._processed = prompt, process_images(self.processor, prompt.images)[1]
        return self._processed[1]


class SPMDPPOTrainerVL(SPMDPPOTrainer):
    """:class:`SPMDPPOTrainer` for vision-language models; takes the same arguments, and ``processor`` as well."""

    multimodal = True
    experience_maker_class = ExperienceMakerVL

    def _problems(self) -> list[str]:
        found = super()._problems()
        if self.processor is None:
            found.append("a vision-language trainer needs the model's processor; pass processor=AutoProcessor...")
        return found
