from __future__ import annotations

from lightrft.deepspeed.adam import lacking_for_cpu_adam


def finds(*names: str):
    return lambda name: f"/usr/bin/{name}" if name in names else None


def test_a_compiler_and_ninja_suffice():
    assert lacking_for_cpu_adam(finds("c++", "ninja"), {}) is None


def test_what_is_missing_is_named():
    assert lacking_for_cpu_adam(finds("ninja"), {}) == "a C++ compiler (c++)"
    assert lacking_for_cpu_adam(finds("c++"), {}) == "ninja"


def test_the_compiler_is_the_one_that_torch_takes():
    assert lacking_for_cpu_adam(finds("clang++", "ninja"), {"CXX": "clang++"}) is None
    assert lacking_for_cpu_adam(finds("c++", "ninja"), {"CXX": "clang++"}) == "a C++ compiler (clang++)"
