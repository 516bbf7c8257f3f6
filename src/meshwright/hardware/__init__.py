"""Room hardware (see docs/design.md)."""
