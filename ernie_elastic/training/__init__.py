"""Pretrains the backbone: the loop, its losses, schedules and record; `engines`, `checkpoints`, `guards`."""
