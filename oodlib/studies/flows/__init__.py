"""Flows along their training: specifications, runs, scores, and how mature they are."""
