"""One function over many untrusted items: workers, journals, quarantine."""
