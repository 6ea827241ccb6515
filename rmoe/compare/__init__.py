"""A grid of (router, seed) runs, its typed results, and the statistics that judge them."""
