"""``lightrft train-vl`` as a user runs it: two ranks, data on disk, images in some prompts and not in others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", reason="Qwen2-VL's processor needs it: pip install torchvision pillow")

from safetensors.torch import load_file

from lightrft.testing.tiny_models import save_tiny_model, tiny_image
from lightrft.trainer.metrics import read_metrics

STEPS, PROMPTS = 3, 4


def write_data(folder: Path) -> Path:
    """Prompts with no image, one and two, and of those of a whole step only every other with one: a rank may have
    nothing but text where the other has images.
    """
    lines = []
    for i in range(STEPS * PROMPTS):
        names = [f"{i}_{k}.png" for k in range((0, 1, 0, 2)[i % PROMPTS])]
        for k, name in enumerate(names):
            tiny_image(i + k).save(folder / name)
        lines.append(json.dumps({"question": f"what is {i} ?", "picture": names, "answer": str(i)}) + "\n")
    path = folder / "data.jsonl"
    path.write_text("".join(lines))
    return path


def test_two_ranks_train_a_vision_language_model_on_prompts_with_and_without_images(
    under_torchrun: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, run = save_tiny_model("qwen2_vl", tmp_path / "tiny"), tmp_path / "run"
    (tmp_path / "longer.py").write_text(
        "def longer(prompts, responses, labels, **extras):\n    return [float(len(r)) for r in responses]\n"
    )
    under_torchrun(
        tmp_path,
        "train-vl",
        *("--fsdp", "--engine_type", "hf", "--pretrain", model, "--output_dir", str(run)),
        *("--prompt_data", str(write_data(tmp_path)), "--input_key", "question", "--label_key", "answer"),
        *("--images_key", "picture", "--apply_chat_template", "--reward", "longer:longer"),
        *("--rollout_batch_size", str(PROMPTS), "--n_samples_per_prompt", "2", "--generate_max_len", "4"),
        *("--train_batch_size", "8", "--micro_train_batch_size", "2", "--actor_learning_rate", "0.01"),
        *("--init_kl_coef", "0", "--max_steps", str(STEPS), "--mixed_mm_data"),
    ).results()
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    # Both saw the same images: engine and trainer agree on the probability of every token of every rank.
    assert all(line["logprob_drift_max"] < 1e-4 for line in lines)
    before, after = load_file(Path(model) / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not value.equal(after[name])}
    assert {"visual" in name for name in moved} == {True, False}
    AutoModelForImageTextToText.from_pretrained(run / "model")
    assert AutoProcessor.from_pretrained(run / "model").image_processor is not None
