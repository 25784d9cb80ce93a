"""Plain data parallelism and a parrot."""
