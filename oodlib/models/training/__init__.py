"""Recipes for classifiers, flows and small ViTs; interrupted runs resume to the same result."""
