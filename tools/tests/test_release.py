from __future__ import annotations

import pytest
from packaging.version import Version

import release


def test_a_first_release_keeps_the_version_it_was_written_with() -> None:
    assert release.next_version(Version("0.1.0"), {"feature"}, released=False) == Version("0.1.0")


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [({"fix"}, "0.3.3"), ({"misc"}, "0.3.3"), ({"fix", "feature"}, "0.4.0"), ({"breaking", "feature"}, "1.0.0")],
)
def test_fragments_decide_the_next_version(kinds: set[str], expected: str) -> None:
    assert release.next_version(Version("0.3.2"), kinds, released=True) == Version(expected)


def test_a_release_without_fragments_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to release"):
        release.next_version(Version("0.1.0"), set(), released=True)


def test_a_fragment_without_a_known_kind_is_refused_by_name() -> None:
    assert release.fragment_kinds(["+resume.feature.md", "12.fix.md", "+a.fix.2.md"]) == {"feature", "fix"}
    for name in ("+resume.md", "+resume.new.md"):
        with pytest.raises(ValueError, match=r"\+resume"):
            release.fragment_kinds([name])


def test_a_new_major_version_names_the_packages_left_behind() -> None:
    ranges = {
        "lightrft-fsdp": ["torch>=2", "lightrft-core>=0.1,<1"],
        "lightrft-trainer": ["lightrft-core[plots]>=0.1,<2"],
    }
    assert release.left_behind(Version("0.2.0"), ranges) == {}
    assert set(release.left_behind(Version("1.0.0"), ranges)) == {"lightrft-fsdp"}


def test_only_the_project_version_is_rewritten() -> None:
    text = '[project]\nname = "x"\nversion = "0.1.0"\n[tool.y]\nversion = "0.1.0"\n'
    expected = '[project]\nname = "x"\nversion = "0.2.0"\n[tool.y]\nversion = "0.1.0"\n'
    assert release.with_version(text, Version("0.2.0")) == expected
