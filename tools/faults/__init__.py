"""`make faults`: faults planted in real jobs of 8 ranks, and whether `doctor hang` blames the right rank."""
