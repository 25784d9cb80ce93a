"""What a training backend must keep, one file a subject; :class:`lightrft.testing.StrategySuite` is all of it."""
