"""What a settings file costs before anyone pays for it: operations, memory, disk, hours."""
