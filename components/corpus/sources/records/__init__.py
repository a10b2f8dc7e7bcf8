"""Records of foreign lists and archives: lines, columns, samples, and an account of every one."""
