"""What the server of ranks imports first: no looking for garbage among what it imports next, a seventh of the time."""

import gc

gc.disable()
