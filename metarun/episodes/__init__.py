"""Tasks as pure functions of their index: sources, stores of images, random numbers."""
