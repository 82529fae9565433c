"""An OpenAI-compatible server over strop.Model, for one machine."""
