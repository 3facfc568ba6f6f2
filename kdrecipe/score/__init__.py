"""Error rates, resampling, comparisons, claims, hypotheses."""
