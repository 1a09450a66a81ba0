"""Search over Composite sequences: proxy tasks, proposers, studies, aggregation and extrapolation."""
