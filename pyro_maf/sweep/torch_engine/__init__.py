"""The engine of torch's operations, for any device, dtype and univariate map: it defines what is right."""
