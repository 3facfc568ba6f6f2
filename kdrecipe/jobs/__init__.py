"""The engine that runs jobs; it knows no stage."""
