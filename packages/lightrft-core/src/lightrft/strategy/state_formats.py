"""The known formats of training state, and which one a folder has."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from .errors import CheckpointError, PluginError
from .fragments import FRAGMENTS
from .hub_record import HubRecord
from .registry import available, load_plugin
from .state_source import StateFormat, StateSource

logger = logging.getLogger("lightrft")
DCP_METADATA = ".metadata"


def _open_dcp(folder: Path) -> StateSource:
    from .dcp_files import open_dcp  # slow to import, and not needed with another backend

    return open_dcp(folder)


DCP = StateFormat(
    name="dcp",
    title=f"PyTorch's distributed checkpoint ({DCP_METADATA})",
    recognises=lambda folder: (folder / DCP_METADATA).is_file(),
    open=_open_dcp,
)
CORE_FORMATS = (FRAGMENTS, DCP)


def known_formats() -> Iterator[StateFormat]:
    """Core's formats, then those of the installed strategies (``StrategyBase.state_formats``)."""
    yield from CORE_FORMATS
    for name in available("strategies"):
        try:
            yield from load_plugin("strategies", name).state_formats
        except (PluginError, AttributeError) as error:
            logger.debug("strategy %s has no formats to offer: %s", name, error)


def format_of(folder: Path) -> StateFormat | None:
    """The format of a model's folder, or None if it is unknown."""
    return next((known for known in known_formats() if known.recognises(folder)), None)


def open_state(folder: Path) -> StateSource:
    """Open a model's training state in any known format.

    :raises CheckpointError: the format is not known (names those that are), or the files are damaged.
    """
    found = format_of(folder)
    if found is None:
        titles = "; ".join(known.title for known in known_formats())
        raise CheckpointError(f"{folder}: holds no training state of a known format. Known: {titles}")
    source = found.open(folder)
    record = HubRecord.read(folder)
    if record is not None:
        source.prefix = record.prefix
    return source
