"""What is told of the method: summaries, benchmarks, pictures, plots, and the trained models."""
