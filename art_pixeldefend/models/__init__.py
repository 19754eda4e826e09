"""Image models: what they share, their files, their trainer, and one package or module for each kind."""
