"""What a run that failed is told as: its history, a small case of it, a file to replay."""
