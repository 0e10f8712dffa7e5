"""Pools of Vision Transformers: the tables, how their models are had or trained, their scores, the study of both."""
