"""From models and text to what became of features."""
