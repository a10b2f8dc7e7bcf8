"""Commands that make pictures, measure them and report on them."""
