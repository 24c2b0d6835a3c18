"""A trained network at work: on video, as a trajectory, in other formats."""
