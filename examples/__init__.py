"""Checkpoints whose right answers are known, and the scripts that train them."""
