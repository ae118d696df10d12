"""What a run writes and reads again: checkpoints, written in the background, and the check that it is the same run."""
