"""Finding the layers of a model that are really called, and swapping them."""
