"""Criteria: which experts of a layer may go. Each takes the statistics of one layer and knows no model family."""
