"""Fits the constants of devices, network and stacks to published measurements. Run with `python -m tools.calibrate`."""
