"""Images drawn without any download: letters of many scripts, digits, textures, unit tests."""
