"""`python -m smolds_dist` is the `smolds` command."""

from smolds_dist.cli import main

if __name__ == "__main__":
    main()
