"""Finding the bundled models, and the few architectures that transformers and diffusers lack."""
