"""Options: dataclasses with their help, and where they come from.

Flags, YAML and Python give the same values; a launcher's settings are obeyed or refused. torch is not imported.
"""
