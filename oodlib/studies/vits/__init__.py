"""Pools of Vision Transformers: the tables, how their models are loaded or trained, their scores,
the study of both.
"""
