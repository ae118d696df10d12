"""Post-training by reinforcement: the replay buffer, the objective and the hints."""
