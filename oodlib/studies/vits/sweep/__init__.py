"""Scoring a whole pool of models, on this machine or a cluster: jobs, cost, launch, results."""
