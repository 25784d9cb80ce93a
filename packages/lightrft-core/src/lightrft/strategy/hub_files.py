"""Where the tensors of a saved model lie."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open


def pretrained_files(name: str) -> dict[str, Path]:
    """Hub name to safetensors file, of a folder or of a hub name in the local cache; empty where there is none."""
    if not name:
        return {}
    folder = Path(name)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        found = None
        for file in ("model.safetensors.index.json", "model.safetensors"):
            try:
                found = found or cached_file(name, file, local_files_only=True)
            except OSError:  # not in the cache
                continue
        if found is None:
            return {}
        folder = Path(found).parent
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files
