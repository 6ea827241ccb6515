"""What a model costs on a cluster, on paper: parameters, memory, FLOPs, traffic, time, and which layout to take."""
