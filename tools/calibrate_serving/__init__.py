"""Fits the traits of inference engines to published measurements. Run with `python -m tools.calibrate_serving`."""
