"""The parts of the measurement: each function runs in a process of its own and records what it finds."""
