"""`python -m quantconvert`."""

from quantconvert.cli.main import run

if __name__ == "__main__":
    run()
