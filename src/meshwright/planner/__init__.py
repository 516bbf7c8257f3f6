"""Room planner (see docs/design.md)."""
