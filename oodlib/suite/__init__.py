"""The machinery of the notebooks: finding, running, verifying, reporting, and the course made of
them.
"""
