"""From numbers to decisions: intervals, tests, power, the gate."""
