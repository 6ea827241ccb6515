"""An OpenAI-compatible endpoint for one model, with limits. Needs the extra `serve`."""
