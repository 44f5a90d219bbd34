"""Training runs on the library: data, one training loop, and a comparison of finished runs."""
