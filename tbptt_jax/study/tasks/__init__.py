"""Tasks of a name: those whose best score is known, text, and time series."""
