"""What long work says of itself: progress, rates, metrics over steps. It changes no output."""
