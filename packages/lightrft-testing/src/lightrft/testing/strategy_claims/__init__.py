"""Claims about training backends, one file per subject; :class:`lightrft.testing.StrategySuite` has all of them."""
