"""What tests and trials need of a package: tiny checkpoints to serve."""
