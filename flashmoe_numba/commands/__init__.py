"""The commands of `flashmoe`, one module each."""
