"""`python -m quantconvert`."""

from quantconvert.cli.entry import run

if __name__ == "__main__":
    run()
