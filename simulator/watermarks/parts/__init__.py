"""What several watermark schemes share."""
