"""Long trials of what must never be lost: ``make soak``."""
