"""Hugging Face models as the engine uses them: loaded, saved and named, their log-probabilities, their samples.

Nothing here knows what is trained.
"""
