"""The embedded world of shapes and tones: scenes, drawn, sounded and told, and the checkers that read answers back."""
