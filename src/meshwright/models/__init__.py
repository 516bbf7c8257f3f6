"""Room models (see docs/design.md)."""
