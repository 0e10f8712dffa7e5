"""Training a pool, and scoring all models of a pool, on one machine or a cluster."""
