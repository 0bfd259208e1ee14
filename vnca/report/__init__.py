"""Reports on the method: summaries, benchmarks, pictures, plots, a study and trained models."""
