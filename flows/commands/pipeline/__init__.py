"""Commands about runs: plan, compare, trace, reproduce, sweep, submit."""
