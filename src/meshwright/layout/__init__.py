"""Room layout (see docs/design.md)."""
