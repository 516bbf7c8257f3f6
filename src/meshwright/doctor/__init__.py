"""The doctor: what is wrong with a plan or a run, and what would cure it (docs/doctor.md). It never runs a model."""
