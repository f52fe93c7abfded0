"""Does the model obey its prompts, and does the adapter understand what it sees? Numbers with intervals, as JSON."""
