"""The claims of the engine suites, one subject a file."""
