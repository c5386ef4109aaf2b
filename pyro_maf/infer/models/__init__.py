"""A Pyro model as a function of one vector: runs, plates, latent sites, supports, coordinates, log joint density."""
