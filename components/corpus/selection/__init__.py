"""From the table of signals to kept rows and training slices."""
