"""One module per command of the command line; `flows.cli` puts them together."""
