"""Rollout engines. Each is a module of its own, found through the entry-point group ``lightrft.engines``.

Importing this package loads no engine's library; an engine imports its own when it starts.
"""
