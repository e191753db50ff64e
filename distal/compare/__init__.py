"""Does it work: strategies compared, measures judged."""
