"""Training files: reading tables and images, and the faults of their rows."""
