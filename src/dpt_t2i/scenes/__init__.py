"""The embedded world: drawn scenes with exact captions, boxes and hard negatives, and a checker that reads pixels."""
