"""What stops, skips or rolls back a step that went wrong: loss spikes, values that are not finite, ranks that hang."""
