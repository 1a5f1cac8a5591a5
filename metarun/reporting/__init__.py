"""What `metarun report` shows: runs gathered, grouped, tabled, plotted. Imports no torch."""
