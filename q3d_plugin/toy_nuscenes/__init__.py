"""Generator of a small synthetic data set in the exact nuScenes format (`v1.0-mini`)."""
