"""What a run and its files say, told from storage alone."""
