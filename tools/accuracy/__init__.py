"""Regenerates docs/accuracy.md: predictions and other tools against measurements (`python -m tools.accuracy`)."""
