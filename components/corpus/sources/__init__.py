"""Where candidates come from: folders, lists of addresses, archives, published metadata."""
