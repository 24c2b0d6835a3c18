"""TrackNet."""
