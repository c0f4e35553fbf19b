"""Weight to integer codes. Round-to-nearest is the only method so far."""
