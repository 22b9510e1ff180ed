"""Components of somebody else's for extraction-simulator, one module each."""
