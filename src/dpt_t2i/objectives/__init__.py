"""Losses without parameters: matching, grounding and denoising, each a dictionary or scalar of float32."""
