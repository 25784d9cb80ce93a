"""A short supervised warm start for the default task: enough that rewards are not all zero, and no more.

Reinforcement learning needs a policy that is sometimes right. This trains the untrained model on solved questions until
its held-out accuracy is in a window well below the run's goal, and returns how many steps that took.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tasks import TaskExample, TaskSplit, build_model, build_tokenizer, reverse_digits

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class WarmStartReport:
    """What the warm start did.

    :param steps: supervised optimizer steps that the returned weights have seen.
    :param batch_size: questions per step. :param accuracy: greedy exact match on the held-out questions, 0 to 1.
    :param seconds: wall time, without the start of Python.
    """

    steps: int
    batch_size: int
    accuracy: float
    held_out: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"supervised warm start: {self.steps} steps of {self.batch_size} solved questions, held-out accuracy "
            f"{self.accuracy:.3f} on {self.held_out} questions, {self.seconds:.1f} s"
        )


def encode_solved(tokenizer: Any, examples: Sequence[TaskExample]) -> tuple[Tensor, int]:
    """Prompt, answer and end token of each question as ``[N, T]`` ids, and the prompts' length.

    :raises ValueError: prompts or answers of different lengths: this trainer does not pad.
    """
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    answers = tokenizer([example.label for example in examples])["input_ids"]
    if len({len(ids) for ids in prompts}) != 1 or len({len(ids) for ids in answers}) != 1:
        raise ValueError("warm start: all prompts must have one length, and all answers one length")
    rows = [[*prompt, *answer, tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
    return torch.tensor(rows), len(prompts[0])


@torch.no_grad()
def greedy_accuracy(model: Any, rows: Tensor, prompt_length: int) -> float:
    """Share of rows whose answer the model would decode greedily, end token included.

    One forward pass is enough: greedy decoding gives the answer exactly if each of its tokens is the likeliest after
    the previous ones.
    """
    predicted = model(input_ids=rows, use_cache=False).logits[:, prompt_length - 1 : -1].argmax(-1)
    return (predicted == rows[:, prompt_length:]).all(dim=1).float().mean().item()


def warm_start(
    model: Any,
    tokenizer: Any,
    split: TaskSplit,
    *,
    seed: int = 42,
    window: tuple[float, float] = (0.2, 0.28),
    batch_size: int = 128,
    learning_rate: float = 5e-4,
    max_steps: int = 1000,
) -> WarmStartReport:
    """Train ``model`` in place on solved training questions until its held-out accuracy lies in ``window``.

    Steps that jump over the window are undone, back to the last that was measured, and the learning rate halved: the
    same seed gives the same steps.

    :param window: lowest and highest held-out accuracy to stop at, 0 <= low < high <= 1.
    :raises ValueError: an empty window, or a model that starts above it.
    :raises RuntimeError: the window is not reached within ``max_steps``.
    """
    low, high = window
    if not 0 <= low < high <= 1:
        raise ValueError(f"warm start: window {window} must be 0 <= low < high <= 1")
    start = time.perf_counter()
    train, prompt_length = encode_solved(tokenizer, split.train)
    held_out, _ = encode_solved(tokenizer, split.held_out)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    model.train()
    accuracy = greedy_accuracy(model, held_out, prompt_length)
    if accuracy > high:
        raise ValueError(f"warm start: the model's held-out accuracy is {accuracy:.3f} already, above {high}")
    steps, seen = 0, copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    while accuracy < low:
        if steps == max_steps:
            accuracy = greedy_accuracy(model, held_out, prompt_length)
            raise RuntimeError(f"warm start: held-out accuracy {accuracy:.3f} after {steps} steps; {low} was required")
        rows = train[torch.randint(len(train), (batch_size,), generator=generator)]
        logits = model(input_ids=rows, use_cache=False).logits[:, prompt_length - 1 : -1]
        answers = rows[:, prompt_length:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        if (logits.argmax(-1) == answers).all(dim=1).float().mean() < low / 4:
            continue  # far below the window: to measure it would take longer than the step
        reached = greedy_accuracy(model, held_out, prompt_length)
        if reached > high:
            model.load_state_dict(seen[0])
            optimizer.load_state_dict(seen[1])
            for group in optimizer.param_groups:
                group["lr"] /= 2
        else:
            accuracy = reached
        seen = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return WarmStartReport(
        steps=steps,
        batch_size=batch_size,
        accuracy=accuracy,
        held_out=len(held_out),
        seconds=time.perf_counter() - start,
    )


def build_warm_model(out_dir: str | pathlib.Path, *, seed: int = 42, split: TaskSplit | None = None) -> WarmStartReport:
    """Write the default model after its warm start, with its tokenizer, as a Hugging Face folder.

    :param split: the task's questions; default: :func:`lightrft.data.tasks.reverse_digits` with this seed.
    """
    split = split or reverse_digits(seed=seed)
    model, tokenizer = build_model(seed=seed), build_tokenizer()
    report = warm_start(model, tokenizer, split, seed=seed)
    folder = pathlib.Path(out_dir)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("%s", report)
    return report
