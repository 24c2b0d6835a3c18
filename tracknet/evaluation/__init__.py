"""What a network finds in a data set, and how good that is."""
