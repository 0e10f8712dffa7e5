"""Training recipes: classifiers, flows, small ViTs; each resumes an interrupted run with the same
result.
"""
