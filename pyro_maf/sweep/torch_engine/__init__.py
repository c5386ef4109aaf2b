"""The engine of torch operations, for any device, dtype and univariate map, which defines correctness."""
