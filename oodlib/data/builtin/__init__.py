"""Images drawn on the spot, without any download: letters of many scripts, digits, textures, unit
tests.
"""
