"""The pipeline end to end: demo, doctor, routing."""
