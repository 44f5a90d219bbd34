"""Results of runs: collected, compared, in tables, on a page, and beside the published ones of a paper."""
