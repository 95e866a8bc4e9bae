"""What is each paper's own, on top of the one operator."""
