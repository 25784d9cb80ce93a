from __future__ import annotations

import smoke

SOUND = [
    "lightrft/fsdp/__init__.py",
    "lightrft/fsdp/py.typed",
    "lightrft/fsdp/deep/er.py",
    "lightrft_fsdp-0.1.0.dist-info/licenses/LICENSE",
]


def test_a_sound_wheel_has_no_fault() -> None:
    assert smoke.file_faults(SOUND) == []
    assert smoke.portions(SOUND) == ["lightrft.fsdp"]


def test_a_wheel_that_owns_the_namespace_is_refused() -> None:
    faults = smoke.file_faults([*SOUND, "lightrft/__init__.py"])
    assert any("hides every other distribution" in fault for fault in faults)
    assert any("belongs to no distribution" in fault for fault in smoke.file_faults([*SOUND, "lightrft/stray.py"]))


def test_a_wheel_without_type_marker_or_license_is_refused() -> None:
    assert "py.typed" in smoke.file_faults([path for path in SOUND if not path.endswith("py.typed")])[0]
    assert "LICENSE" in smoke.file_faults(SOUND[:3])[0]


def test_a_sibling_is_required_through_an_extra_or_not_at_all() -> None:
    def faults(requirement: str) -> list[str]:
        return smoke.requirement_faults("lightrft-trainer", ["torch>=2", "lightrft-core<1,>=0.1", requirement])

    assert faults('lightrft-fsdp>=0.1 ; extra == "fsdp"') == []
    assert "through an extra only" in faults("lightrft-fsdp>=0.1")[0]
    assert "nothing published" in faults('lightrft-testing ; extra == "test"')[0]


def test_python_examples_are_cut_out_of_a_page() -> None:
    page = "```bash\nlightrft train\n```\ntext\n```python\nx = 1\nassert x\n```\n\n```python\ny = 2\n```\n"
    assert smoke.python_blocks(page) == ["x = 1\nassert x\n", "y = 2\n"]
