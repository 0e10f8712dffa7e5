"""Flows along their training: what they are trained on, their runs, their scores, and how mature
they are.
"""
