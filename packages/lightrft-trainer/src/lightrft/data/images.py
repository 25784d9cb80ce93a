"""Images of a record: checked when the dataset is read, opened when they are needed."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping
from typing import Any

from .records import DataError, Record


def image_references(record: Record, images_key: str | None) -> list[Any]:
    """The record's images, unopened: absolute paths, bytes, or images. No such key, None and [] mean none.

    :raises DataError: a path that does not exist, or a value that is not an image.
    """
    value = None if images_key is None else record.values.get(images_key)
    if value is None:
        return []
    return [_reference(item, record.folder) for item in (value if isinstance(value, (list, tuple)) else [value])]


def _reference(item: Any, folder: str | None) -> Any:
    if isinstance(item, Mapping):  # the encoded form of datasets.Image
        if item.get("bytes") is not None:
            return item["bytes"]
        item = item.get("path")
    if isinstance(item, (str, pathlib.Path)):
        path = pathlib.Path(folder or "", item).expanduser().absolute()
        if not path.is_file():
            raise DataError(f"no image {path}")
        return str(path)
    if isinstance(item, bytes) or hasattr(item, "convert"):
        return item
    raise DataError(f"a {type(item).__name__} is no image; write a path")


def open_image(reference: Any) -> Any:
    """A PIL image in RGB.

    :raises DataError: Pillow cannot read the image.
    """
    from PIL import Image, UnidentifiedImageError

    if hasattr(reference, "convert"):
        return reference.convert("RGB")
    try:
        with Image.open(io.BytesIO(reference) if isinstance(reference, bytes) else reference) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"cannot open image {reference if isinstance(reference, str) else 'bytes'}: {error}") from error
