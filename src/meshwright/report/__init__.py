"""Room report (see docs/design.md)."""
