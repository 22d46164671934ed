"""What the reference policy says of every stored token, computed once and kept on disk.

`columns` asks the reference; `cache` keeps its answers under their content's address.
"""
