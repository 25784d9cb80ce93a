"""``lightrft doctor``: is this machine, with this backend and engine, fit to train?"""

from __future__ import annotations

from .command import add_doctor_arguments, run_doctor

__all__ = ["add_doctor_arguments", "run_doctor"]
