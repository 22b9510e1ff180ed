"""Images in, images out: what is done to pixels, each way in one file."""
