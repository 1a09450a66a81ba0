"""Evidence: what a search's scores, proposers and aggregators are worth. Pure functions on study data."""
