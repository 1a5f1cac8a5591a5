"""What a trained run is for: new tasks, made of pictures that nobody has split into episodes."""
