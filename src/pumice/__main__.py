"""`python -m pumice` and `torchrun … -m pumice`: the command line."""

from pumice.cli.main import run

if __name__ == "__main__":
    run()
