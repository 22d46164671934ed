"""A run's results as a page: findings, plots, report.html, report.md, report.json.

`run` reports one run; the demonstration's report compares several.
"""
