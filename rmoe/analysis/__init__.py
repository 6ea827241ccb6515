"""Recorded routing -> numbers: what a Mixture-of-Experts model's routers do, measured."""
