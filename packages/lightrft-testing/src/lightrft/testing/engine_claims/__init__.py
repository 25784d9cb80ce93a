"""The claims of the engine suites, one file per subject."""
