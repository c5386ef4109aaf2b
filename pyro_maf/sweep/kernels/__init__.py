"""The compiled engine: walks over the tables of a run of layers, for CPUs, by numba; imported on first use."""
