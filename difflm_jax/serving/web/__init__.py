"""The page at `/`: one HTML file that needs nothing else."""
