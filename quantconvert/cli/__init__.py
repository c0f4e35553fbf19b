"""The command line: a thin shell on `quantconvert.api`."""
