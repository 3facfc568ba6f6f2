"""From hypotheses to figures one can trust, and to the report."""
