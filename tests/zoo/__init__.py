"""Real model classes for tests and sweeps."""
