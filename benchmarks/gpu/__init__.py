"""What an NVIDIA GPU does with the engines of this project."""
