"""Commands about servers, workers and machines."""
