"""Pools of Vision Transformers: tables, loading and training, scores, and the study of them."""
