"""How good a set of detections is."""
