"""The routing of a model that is larger than memory: layer by layer over all tokens."""
