"""Proof: what the source answers, what the artifact answers, and how far apart they are."""
