"""Trains the text, visual and audio tokenizers and the refiner: loop, records, report, one wing for each kind."""
