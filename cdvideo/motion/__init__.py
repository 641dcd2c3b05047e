"""Motion: temporal attention, the walk of the image UNet over frames, and motion files."""
