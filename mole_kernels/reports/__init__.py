"""What gates and experts did, as numbers, plots and one HTML page."""
