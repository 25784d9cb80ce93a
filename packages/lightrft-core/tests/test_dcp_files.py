"""DCP folders: no unsafe pickle, errors that are ours, written one tensor at a time."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.strategy import dcp_files
from lightrft.strategy.dcp_files import METADATA, open_dcp
from lightrft.strategy.errors import CheckpointError
from lightrft.testing.faults import cut


class Bomb:
    """What a hostile pickle looks like."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def test_metadata_that_names_a_function_does_not_run_it(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    (tmp_path / METADATA).write_bytes(pickle.dumps(Bomb(witness)))
    with pytest.raises(CheckpointError, match="no checkpoint needs"):
        open_dcp(tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps(eval)])
def test_metadata_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=METADATA):
        open_dcp(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_objects_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    """DCP would unpickle them freely."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"weight/a": torch.ones(2), "extra": {"python": "object"}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointError, match="is not a tensor"):
        open_dcp(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_that_somebody_else_wrote_is_read_by_its_own_keys(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    tensors = {"layer.weight": torch.randn(3, 4), "scale": torch.tensor(2.5, dtype=torch.bfloat16)}
    dcp.save(dict(tensors), checkpoint_id=tmp_path, no_dist=True)
    source = open_dcp(tmp_path)
    assert source.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(source.whole(name), tensor)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_damaged_file_is_named_with_the_tensor_that_was_wanted(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"weight/a": torch.randn(1000)}, checkpoint_id=tmp_path, no_dist=True)
    source = open_dcp(tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    cut(file)
    with pytest.raises(CheckpointError, match=rf"{file.name}.*weight/a"):
        source.whole("a")
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name}.*weight/a.*missing"):
        source.whole("a")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_written_from_another_source_is_read_by_dcp_itself(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from lightrft.strategy import fragments
    from lightrft.strategy.state_source import Fragment

    weight, moment = torch.randn(3, 4), torch.randn(3, 4)
    (tmp_path / "portable").mkdir()
    parts = [
        Fragment(name="a", kind="weight", start=0, values=weight),
        Fragment(name="a", kind="exp_avg", start=0, values=moment),
    ]
    fragments.write(parts, tmp_path / "portable", 0, 1)
    fragments.write_index({"a": ((3, 4), 7)}, tmp_path / "portable", 1)
    dcp_files.write_source(fragments.open_fragments(tmp_path / "portable"), tmp_path / "dcp")
    found = {"weight/a": torch.zeros(3, 4), "exp_avg/a": torch.zeros(3, 4), "step/a": torch.zeros(())}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(found["weight/a"], weight)
    assert torch.equal(found["exp_avg/a"], moment)
    assert found["step/a"].item() == 7
