"""`python -m pyro_maf`: the command line."""

from pyro_maf.cli import main

if __name__ == "__main__":
    main()
