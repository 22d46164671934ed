"""Several methods on one file with one budget: a plan of runs, a dry run of all, the runs one by one, and a page over all."""
