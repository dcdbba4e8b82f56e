"""In which order do the steps run?  One file per method."""
