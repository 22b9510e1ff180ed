"""The thief washes: what is done to a model so that its watermark goes."""
