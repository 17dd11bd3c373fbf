"""Statistics over verdicts: arrays in, estimates with intervals out. Knows numpy and scipy only."""
