"""Room cost (see docs/design.md)."""
