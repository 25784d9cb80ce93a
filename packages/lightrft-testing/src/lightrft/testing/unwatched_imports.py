"""What the server of ranks imports first: no looking for garbage among what it imports next, a seventh of the time."""

from __future__ import annotations

import gc

gc.disable()
