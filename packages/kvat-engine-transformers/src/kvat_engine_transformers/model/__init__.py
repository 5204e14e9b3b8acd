"""What is tuned: where its files are, and what they tell."""
