"""The commands of `secateur`, one function a file; heavy imports happen inside them, so `--help` answers at once."""
