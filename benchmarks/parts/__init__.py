"""What the benchmarks are made of; the scripts that run are in the folder above."""
