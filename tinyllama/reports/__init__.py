"""What is said about a run after it has ended."""
