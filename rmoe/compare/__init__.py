"""A grid of (router, seed) runs, and the statistics over its results."""
