"""Public image sets: where they come from, how they are read, verified and prepared."""
