"""The stages in a row: what each command runs, the demo, the study."""
