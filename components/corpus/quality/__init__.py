"""How good a photograph is: the table of scorers, and what each of them computes."""
