"""Error rates, intervals, comparisons, claims, hypotheses."""
